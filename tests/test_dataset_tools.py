"""What all dataset tools have in common."""

import pytest
from dataset_commands import ok


@pytest.mark.parametrize(
    "name",
    [
        "tsv_to_dataset",
        "npz_to_dataset",
        "align",
        "captions_to_dataset",
        "check_data",
        "position",
        "extract_features",
        "vocab",
        "download_data",
    ],
)
def test_every_tool_shows_an_example(name):
    assert "example: python " in ok(name, "--help")
