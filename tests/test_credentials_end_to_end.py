"""A dataset at `s3://KEY:SECRET@…`: every command works, and no output and no file holds the secret."""

import json

import pytest
from command_words import TINY, set_words
from object_store import KEY, SECRET, s3_server

from metagmvae.infra.cli import main

pytestmark = [pytest.mark.s3, pytest.mark.slow]


def test_no_file_and_no_output_holds_the_secret(tmp_path, monkeypatch, capfd):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "METAGMVAE_URI_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "s3").mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("METAGMVAE_CACHE", str(work / "cache"))
    outputs = []

    def run(*words, code=0):
        assert main([*words, "--log-file", "log"]) == code, capfd.readouterr()
        outputs.extend(capfd.readouterr())

    with s3_server(tmp_path / "s3") as server:
        query = f"endpoint_override=127.0.0.1:{server.port}&scheme=http&region=us-east-1"
        data, features = (f"s3://{KEY}:{SECRET}@data/{name}?{query}" for name in ("glyphs", "features"))
        run("prepare", "glyphs", "--out", data)
        run("verify", data, "--json")
        tracked = TINY | {"tracking.enabled": "true", "tracking.store": work / "mlflow", "tracking.register_as": "g"}
        run("train", "omniglot-cpu", "--set", f"data.uri={data}", *set_words(tracked | {"run.out": "run"}))
        run("evaluate", "run", "--data", data, "--episodes", "3", "--record", "record.json", "--results", "e.parquet")
        run("evaluate", "run", f"--data={data}", "--episodes", "3", "--json")
        run("features", "run", "--data", data, "--out", features)
        run("figure", "run", "--data", data, "--out", "figures")
        run("compare", "run", "--data", data, "--episodes", "3", "--html", "page.html", "--csv", "page.csv")
        run("train", "omniglot-cpu", "--resume", "--set", f"data.uri={data}", *set_words(tracked | {"run.out": "run"}))
        run("verify", data.replace("glyphs", "nothing"), code=2)
        run("verify", data.replace(SECRET, "wrong/secret"), code=2)
    assert json.loads((work / "record.json").read_text())["data"].startswith("s3://data/glyphs?endpoint_override=")
    assert "s3://data/glyphs" in (work / "run" / "settings.json").read_text()
    holding = [path for path in work.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert holding == []
    assert len([path for path in work.rglob("*") if path.is_file()]) > 30
    assert SECRET not in "".join(outputs)
    assert "wrong/secret" not in "".join(outputs)
