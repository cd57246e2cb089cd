"""The whole Tencent-News flow, from drawn images to MAP@1-3 beside chance, on small sizes."""

import json
import os
import re
import socket

from conftest import ROOT
from processes import free_ports, run

from scripts.demo.make_tencent_demo import beside_chance


def test_demo_trains_serves_scores_and_ranks_well_above_chance(tmp_path):
    ports = free_ports(2)
    environment = {
        **os.environ,
        "OUT": str(tmp_path),
        "TRAIN_FLAGS": "--img_dim 128 --embed_size 64 --num_epochs 4 --batch_size 8 --learning_rate .004 --workers 0 "
        "--mean_warmup_epochs 4 --position_init .02",  # with these, few epochs on few images are enough
        "SENTENCE_PORT": str(ports[0]),
        "TAG_PORT": str(ports[1]),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    sizes = "--train 256 --dev 32 --items 16 --candidates 10 --img_dim 128".split()
    done = run(["sh", str(ROOT / "Tencent_PFAN" / "demo.sh"), *sizes], env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("scored 160 of 160 images, 16 of 16 items have scores") == 3
    header, *rows = [line.split() for line in done.stdout.splitlines() if re.match(r"  .*chance$|(MAP|A)@\d ", line)]
    assert header == ["sentence", "tag", "tag_new", "mixed", "chance"]
    assert [row[0] for row in rows] == ["MAP@1", "MAP@2", "MAP@3", "A@1", "A@2", "A@3"]
    for _, *numbers in rows:
        sentence, _, tag_new, mixed, chance = map(float, numbers)
        assert 0.2 < chance < 0.4
        assert min(sentence, tag_new, mixed) > chance + 0.3  # each model has learned, not only one of the two
    for port in ports:  # both servers have ended
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert (tmp_path / "data" / "tencent_data_meta" / "images" / "0.png").is_file()  # which the server's page shows


def test_chance_is_the_mean_share_of_positive_images(tmp_path, capsys):
    flags = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    (tmp_path / "list.json").write_text("".join(json.dumps({"Img_flags": f}) + "\n" for f in flags))
    for result, number in ("one", 0.5), ("two", 0.75):
        lines = (f"{name}@{k}: {number} 2\n" for name in ("MAP", "Acc") for k in (1, 2, 3))
        (tmp_path / f"{result}.txt").write_text("Len 3 3\n" + "".join(lines))
    beside_chance([tmp_path / "one.txt", tmp_path / "two.txt"], tmp_path / "list.json")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["one", "two", "chance"]
    assert lines[1] == ["MAP@1", "0.500", "0.750", "0.375"]
    assert lines[5] == ["A@2", "0.500", "0.750", "0.500"]
    assert lines[6] == ["A@3", "0.500", "0.750", "0.000"]
