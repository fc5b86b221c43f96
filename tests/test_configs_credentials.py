"""No user name, password or token of a URI stays in texts or settings."""

import pytest

from metagmvae.configs.credentials import redact, take_credentials, with_credentials
from metagmvae.configs.dimensions import parse_dimension
from metagmvae.configs.load import SettingsError, load_settings, to_json


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("s3://KEY:SECRET@bucket/p", "s3://bucket/p"),
        ("s3://KEY:SEC/RET@bucket/p?endpoint_override=http://h:9000", "s3://bucket/p?endpoint_override=http://h:9000"),
        ("s3://:SEC/RET@bucket", "s3://bucket"),
        ("http://user:SEC@RET@host/x", "http://host/x"),
        ("postgresql://user:SEC?RET#x@host/db", "postgresql://host/db"),
        ("http://SECRET@host", "http://host"),
        ("s3://KEY:SECRET@bucket/a@b", "s3://bucket/a@b"),
        ("https://h/x?X-Amz-Signature=SECRET&region=us", "https://h/x?X-Amz-Signature=***&region=us"),
        ("s3://b?access_key=SECRET&secret_key=SECRET", "s3://b?access_key=***&secret_key=***"),
        (
            "s3://b?endpoint_override=http%3A%2F%2Fu%3ASECRET%40h%3A90",
            "s3://b?endpoint_override=http%3A%2F%2Fh%3A90",
        ),
        ("cannot open 's3://KEY:SECRET@b', ask me@home", "cannot open 's3://b', ask me@home"),
    ],
)
def test_secrets_are_removed(text, public):
    assert redact(text) == public
    assert "SECRET" not in redact(f"error at {text}; see it")


@pytest.mark.parametrize(
    "text",
    ["models:/name@alias", "s3://host:9000/a@b", "file:///home/a@b/c", "sqlite:////x/y@z", "data?key=1", "s3://b/p"],
)
def test_other_texts_stay(text):
    assert redact(text) == take_credentials(text) == with_credentials(text) == text


def test_credentials_are_kept_for_the_connection(monkeypatch):
    monkeypatch.delenv("METAGMVAE_URI_CREDENTIALS", raising=False)
    uri = "s3://KEY:SECRET@bucket/p?token=SECRET"
    settings = load_settings("omniglot-cpu", [f"data.uri={uri}"])
    assert settings.data.uri == "s3://bucket/p?token=***"
    assert "SECRET" not in to_json(settings)
    assert with_credentials(settings.data.uri) == uri


@pytest.mark.parametrize(
    "override",
    [
        "tracking.uri=http://user:SECRET@host",
        "tracking.uri=postgresql://user:SECRET@host/db",
        "run.address=ray://user:SECRET@host:1",
        "run.out=s3://KEY:SECRET@b",
        "data.uri.x=s3://KEY:SECRET@b",
        "train.steps=s3://KEY:SECRET@b",
        "s3://KEY:SECRET@b",
    ],
)
def test_settings_refuse_passwords_without_showing_them(override):
    with pytest.raises(SettingsError) as error:
        load_settings("omniglot-cpu", [override])
    assert "SECRET" not in str(error.value)
    if override.startswith("tracking"):
        assert "MLFLOW_TRACKING_URI" in str(error.value)


def test_a_search_space_refuses_passwords():
    with pytest.raises(SettingsError, match="must not hold a password") as error:
        parse_dimension("data.uri", {"kind": "choice", "values": ["a", "s3://KEY:SECRET@b"]})
    assert "SECRET" not in str(error.value)
