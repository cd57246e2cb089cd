"""What all dataset tools have in common."""

import pytest
from dataset_commands import command


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
def test_every_tool_starts_as_a_file_and_shows_an_example(name):
    done = command(name, "--help")
    assert done.returncode == 0 and "example: python " in done.stdout, done.stderr
