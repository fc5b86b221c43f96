"""`prepare`: the account of the files, and the number of rows per shard."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from called_commands import answer_of, refusal_of
from PIL import Image

from metagmvae.infra.cli import main


@pytest.fixture
def images(tmp_path):
    """Ten images in two class folders, and a file that is no image."""
    for number in range(10):
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 9), dtype=np.uint8)).save(buffer, "PNG")
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    (tmp_path / "images" / "a" / "x\x1b[31m.heic").write_bytes(b"x")
    return tmp_path / "images"


def prepare(*words):
    return ["prepare", "folder", "--json", *map(str, words)]


def test_the_answer_accounts_for_every_file(images, tmp_path, capsys):
    answer = answer_of(*prepare("--source", images, "--out", tmp_path / "data"))
    assert answer["files"] == {"seen": 11, "read": 10, "left_out": 1}
    assert answer["suffixes"] == {".png": 10}
    assert answer["left_out"] == [{"reason": "suffix .heic", "files": 1, "names": "a/x\\x1b[31m.heic"}]
    assert answer["folders_without_images"] == []
    assert answer["single_value_images"] == 0
    assert main(["prepare", "folder", "--source", str(images), "--out", str(tmp_path / "text")]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_rows_per_shard(images, tmp_path):
    answer = answer_of(*prepare("--source", images, "--out", tmp_path / "data", "--rows-per-shard", 3))
    assert answer["shards"] == {"train": 4}
    manifest = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert [shard["rows"] for shard in manifest["splits"]["train"]["shards"]] == [3, 3, 3, 1]
    assert main(["verify", str(tmp_path / "data")]) == 0
    for name, option in (("default", ()), ("explicit", ("--rows-per-shard", 8192))):
        assert main(prepare("--source", images, "--out", tmp_path / name, *option)) == 0
    assert (tmp_path / "default" / "dataset.json").read_bytes() == (tmp_path / "explicit" / "dataset.json").read_bytes()
    for number in (0, -1):
        words = prepare("--source", images, "--out", tmp_path / "no", "--rows-per-shard", number)
        assert f"--rows-per-shard is {number}" in refusal_of(*words)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("inside", ["", "data", "a/../b/data"])
def test_the_dataset_is_not_written_into_its_source(images, inside, tmp_path):
    """There its files would be read as a part of the source next time."""
    before = sorted(images.rglob("*"))
    (tmp_path / "link").symlink_to(images)
    for source, out in ((images, images / inside), (tmp_path / "link", images / inside), (images, tmp_path / "link")):
        error = refusal_of(*prepare("--source", source, "--out", out))
        assert f"--out {out}: lies in the source {source}; choose a folder outside of it" in error
    assert sorted(images.rglob("*")) == before


def test_a_full_disk_is_a_failure_of_the_work_and_no_wrong_request(images, tmp_path):
    """As a limit of the file size, in a process of its own; the partial file and the folder are deleted."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
    code += "from metagmvae.infra.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, *prepare("--source", images, "--out", tmp_path / "data")]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    answer = json.loads(ended.stdout)
    assert answer["exit_code"] == 1
    assert "cannot be written (File too large); free some space, and run the command again" in answer["error"]
    assert not (tmp_path / "data").exists()


def test_dry_run_of_prepare_checks_everything_and_writes_nothing(tmp_path):
    words = ["prepare", "glyphs", "--out", str(tmp_path / "data"), "--dry-run"]
    answer = answer_of(*words)
    assert answer["samples"] == {"train": 8000, "validation": 1200, "test": 2000}
    assert answer["data"] == str(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("precious")
    assert "not empty and not a dataset" in refusal_of(*words)
    assert main([*words, "--rows-per-shard", "0"]) == 2
