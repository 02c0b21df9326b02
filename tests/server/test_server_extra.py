"""The core works without the packages of the extra, and the command says what to install."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reprise.cli.serve import PACKAGES


@pytest.mark.parametrize(
    "modules",
    ["reprise.cli.app", pytest.param("reprise.llm, reprise.async_llm", marks=pytest.mark.long)],
)
def test_the_core_imports_none_of_them(modules: str) -> None:
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {(*PACKAGES, 'starlette')!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"import {modules}\n"
        "sys.argv = ['reprise', 'serve', '--help']\n"
        "from reprise.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--max-num-queued-reqs" in done.stdout


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from reprise.cli.app import app

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvloop" else find(name)
    )
    result = CliRunner().invoke(app, ["serve"])
    assert result.exit_code == 2
    assert "needs uvloop: pip install 'reprise[server]'" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--port", "99999"), "--port=99999"),
        (("--ssl-keyfile", "/nowhere"), "--ssl-certfile"),
        (("--allowed-origins", "*", "--allow-credentials"), "name the origins"),
        (("--chat-template", "/nowhere.jinja"), "--chat-template='/nowhere.jinja'"),
        (("--override-generation-config", '{"temperature": -1}'), "temperature=-1"),
        (("--override-generation-config", '{"temprature": 1}'), "temprature"),
        (("--override-generation-config", '{"n": 2}'), "n=2: each request says it"),
        (("--override-generation-config", '{"logprobs": 0}'), "logprobs=0: each request says it"),
        (("--reasoning-parser", "nonsense"), "--reasoning-parser='nonsense'"),
        (("demo", "--model", "other"), "contradict"),
    ],
)
def test_wrong_options_are_told_at_once(arguments: tuple[str, ...], told: str) -> None:
    from reprise.cli.app import app

    result = CliRunner().invoke(app, ["serve", "--port", "0", *arguments])
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())


CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBbTCCAROgAwIBAgIUBSuiCakBhFkdplkBJgEgtpg/jbQwCgYIKoZIzj0EAwIw
DDEKMAgGA1UEAwwBeDAeFw0yNjExMjkwMDAyMTZaFw0yNjExMzAwMDAyMTZaMAwx
CjAIBgNVBAMMAXgwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASApCnMrHNQh0br
K887cqFu53MEOuvEsByQSFXDTqqU+dTlOLJxjkvJsZswtDT9qUaO4M3Mt8yltEA4
3gELXiZZo1MwUTAdBgNVHQ4EFgQUfoNpjFEREfiGOIuB4T0WMBc/VQ8wHwYDVR0j
BBgwFoAUfoNpjFEREfiGOIuB4T0WMBc/VQ8wDwYDVR0TAQH/BAUwAwEB/zAKBggq
hkjOPQQDAgNIADBFAiBbCfnUatu+kyo2k1VzngShkNs7RjTBFSW3hZYyjX7ZrwIh
AKfLzCcUgtIFUZLB2GHskAjFBJGzWeawNSsH97whKbVS
-----END CERTIFICATE-----
"""
ENCRYPTED_KEY = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHjME4GCSqGSIb3DQEFDTBBMCkGCSqGSIb3DQEFDDAcBAhO24aiKdZwwgICCAAw
DAYIKoZIhvcNAgkFADAUBggqhkiG9w0DBwQIUcM0iLRPhWIEgZBIWxWC3quXmFK6
c24d05a66BJShcUpRVNFWb3hyX2pZHFPBj/Q+OIRX1egBTUv3tKstG/g5Pd48p49
pUNMDDydnkNXe9W/tLty90SFg1klDerywta8uHHlS2r6ruEqgGtCX2OWAJapjzsa
QjUSHEYUsL0aXKA0miqcw7b/OTFrmJqeYR1crq6aJuRlfoeiT3I=
-----END ENCRYPTED PRIVATE KEY-----
"""
KEY = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIK1MXQ+Epk9r/11GzBSBwQSoW0iT6xZqeJQYKKSLC9CjoAoGCCqGSM49
AwEHoUQDQgAEgKQpzKxzUIdG6yvPO3KhbudzBDrrxLAckEhVw06qlPnU5TiycY5L
ybGbMLQ0/alGjuDNzLfMpbRAON4BC14mWQ==
-----END EC PRIVATE KEY-----
"""
OTHER_KEY = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIMozWzw9jqM6Sd6ifBg+ffKFqef1tPc0MZNOkt+d0ZL0oAoGCCqGSM49
AwEHoUQDQgAEY0Paw/cO+0TnDTfbxApUCubFwBAGBoYJ6jSytdy/Me0/n4mx0FhE
clChkU4en775xmXOHjXQCWAzA93H9ES2ew==
-----END EC PRIVATE KEY-----
"""


@pytest.mark.parametrize(
    ("key", "authorities", "told"),
    [
        (CERTIFICATE, None, "--ssl-certfile"),
        (OTHER_KEY, None, "key values mismatch"),
        (ENCRYPTED_KEY, None, "without a pass phrase"),
        (KEY, OTHER_KEY, "--ssl-ca-certs"),
    ],
)
def test_wrong_certificates_are_told_at_once(
    tmp_path: Path, key: str, authorities: str | None, told: str
) -> None:
    """Each HTTP process would end at them, and the next one."""
    from reprise.cli.app import app

    texts = {"--ssl-certfile": CERTIFICATE, "--ssl-keyfile": key, "--ssl-ca-certs": authorities}
    arguments = ["serve", "--port", "0", "--model", str(tmp_path)]
    for flag, text in texts.items():
        if text is not None:
            (tmp_path / flag).write_text(text)
            arguments += [flag, str(tmp_path / flag)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())
