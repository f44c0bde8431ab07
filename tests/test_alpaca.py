"""Download of Stanford Alpaca from a local hub server."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from helpers.common import assert_user_error
from helpers.hub_server import run_module, serve

README = b"---\nconfigs:\n- config_name: default\n  data_files: data/train.parquet\n---\n"


def hub(tmp_path, rows: int, columns=("instruction", "input", "output", "text")) -> dict:
    table = pyarrow.table({name: [f"{name} {i} é" for i in range(rows)] for name in columns})
    pyarrow.parquet.write_table(table, tmp_path / "made.parquet")
    content = (tmp_path / "made.parquet").read_bytes()
    return {"datasets/tatsu-lab/alpaca": {"README.md": README, "data/train.parquet": content}}


def download(tmp_path, environment: dict, *arguments, check: bool = True):
    return run_module("finetune_data.alpaca_downloader", "--out", tmp_path / "new" / "alpaca.json",
                      *arguments, check=check, cwd=tmp_path,
                      env=environment | {"HF_HOME": str(tmp_path / "hf")})


@pytest.mark.slow
def test_download_with_the_real_client(tmp_path):
    """All 52,002 rows, then a second run that has nothing to do and no server."""
    with serve(hub(tmp_path, 52_002)) as (environment, _):
        assert "52,002 rows" in download(tmp_path, environment).stdout
    path = tmp_path / "new" / "alpaca.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert len(rows) == 52_002
    assert rows[7] == {"instruction": "instruction 7 é", "input": "input 7 é",
                       "output": "output 7 é"}
    before = path.stat().st_mtime_ns
    assert "alpaca.json exists already" in download(tmp_path, environment).stdout
    assert path.stat().st_mtime_ns == before


@pytest.mark.slow
def test_network_faults_do_not_change_the_file(tmp_path):
    """The `datasets` client with dropped connections, truncated bodies and error statuses."""
    files, written = hub(tmp_path, 52_002), {}
    for name, faults in (("clean", []), ("faulty", [503, "drop", "cut", 429, 500, "cut"])):
        (tmp_path / name).mkdir()
        with serve(files, faults=faults) as (environment, pending):
            download(tmp_path / name, environment)
        assert not pending
        written[name] = (tmp_path / name / "new" / "alpaca.json").read_bytes()
    assert written["clean"] == written["faulty"]


@pytest.mark.slow
@pytest.mark.parametrize("repos, words", [
    (lambda tmp: hub(tmp, 100), ["100 rows", "52,002"]),
    (lambda tmp: hub(tmp, 52_002, columns=("instruction", "answer")), ["answer", "output"]),
    (lambda tmp: {}, ["tatsu-lab/alpaca"])])
def test_another_data_set_is_refused(tmp_path, repos, words):
    with serve(repos(tmp_path)) as (environment, _):
        result = download(tmp_path, environment, check=False)
    assert_user_error(result, *words)
    assert not list(tmp_path.glob("new/*"))
