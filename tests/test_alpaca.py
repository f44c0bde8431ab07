"""Download of Stanford Alpaca from a local hub server."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from helpers.common import assert_user_error, user_error
from helpers.hub_server import run_module, serve

from finetune_data.rows import download_rows

FILE = "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"


def hub(tmp_path) -> dict:
    table = pyarrow.table({name: [f"{name} {i} é" for i in range(100)]
                           for name in ("instruction", "input", "output", "text")})
    pyarrow.parquet.write_table(table, tmp_path / "made.parquet")
    content = (tmp_path / "made.parquet").read_bytes()
    return {"datasets/tatsu-lab/alpaca": {"README.md": b"x", FILE: content}}


def download(tmp_path, environment: dict, *arguments, check: bool = True):
    return run_module("finetune_data.alpaca_downloader", "--out", tmp_path / "new" / "alpaca.json",
                      *arguments, check=check, cwd=tmp_path,
                      env=environment | {"HF_HOME": str(tmp_path / "hf")})


@pytest.mark.slow
def test_download_with_the_real_client(tmp_path):
    """All rows, then a second run that has nothing to do and no server."""
    with serve(hub(tmp_path)) as (environment, _):
        assert "100 rows" in download(tmp_path, environment).stdout
    path = tmp_path / "new" / "alpaca.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert len(rows) == 100
    assert rows[7] == {"instruction": "instruction 7 é", "input": "input 7 é",
                       "output": "output 7 é"}
    before = path.stat().st_mtime_ns
    assert "alpaca.json exists already" in download(tmp_path, environment).stdout
    assert path.stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_cleaned_variant_is_a_json_list(tmp_path):
    rows = [{"output": f"o{i}", "input": "", "instruction": f"i{i}", "more": 1} for i in range(9)]
    files = {"alpaca_data_cleaned.json": json.dumps(rows).encode(), "README.md": b"x"}
    with serve({"datasets/yahma/alpaca-cleaned": files}) as (environment, _):
        download(tmp_path, environment, "--cleaned")
    written = json.loads((tmp_path / "new" / "alpaca.json").read_text(encoding="utf-8"))
    assert written == [{"instruction": row["instruction"], "input": "", "output": row["output"]}
                       for row in rows]


@pytest.mark.slow
def test_network_faults_do_not_change_the_file(tmp_path):
    """Dropped connections, truncated and corrupt bodies, and error statuses."""
    files, written = hub(tmp_path), {}
    for name, faults in (("clean", []), ("faulty", [503, "drop", "cut", 429, "flip", 500, "cut"])):
        (tmp_path / name).mkdir()
        with serve(files, faults=faults) as (environment, pending):
            download(tmp_path / name, environment)
        assert not pending
        written[name] = (tmp_path / name / "new" / "alpaca.json").read_bytes()
    assert written["clean"] == written["faulty"]


@pytest.mark.parametrize("repos, words", [
    ({"datasets/tatsu-lab/alpaca": {"data/x": b""}}, ["tatsu-lab/alpaca", FILE]),
    ({}, ["tatsu-lab/alpaca"])])
def test_a_missing_data_set_is_reported(tmp_path, repos, words):
    with serve(repos) as (environment, _):
        result = download(tmp_path, environment, check=False)
    assert_user_error(result, *words)
    assert not list(tmp_path.glob("new/*"))


def test_a_folder_is_no_file_to_write(tmp_path):
    assert f"--out {tmp_path} is a folder" in user_error(
        download_rows, "a/b", "0" * 40, "c.json", (), tmp_path)
