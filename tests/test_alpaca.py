import json

import pyarrow
import pyarrow.parquet
import pytest
from helpers.common import ROOT, assert_user_error, run_script
from helpers.hub_server import serve

SCRIPT = ROOT / "finetune_data" / "alpaca_downloader.py"
README = b"---\nconfigs:\n- config_name: default\n  data_files: data/train.parquet\n---\n"


def hub(tmp_path, rows: int, columns=("instruction", "input", "output", "text")) -> dict:
    table = pyarrow.table({name: [f"{name} {i} é" for i in range(rows)] for name in columns})
    pyarrow.parquet.write_table(table, tmp_path / "made.parquet")
    content = (tmp_path / "made.parquet").read_bytes()
    return {"datasets/tatsu-lab/alpaca": {"README.md": README, "data/train.parquet": content}}


def download(tmp_path, environment: dict, *arguments, check: bool = True):
    return run_script(SCRIPT, "--out", tmp_path / "deep" / "alpaca.json", *arguments, check=check,
                      cwd=tmp_path, env=environment | {"HF_HOME": str(tmp_path / "hf")})


def test_the_real_client_against_a_local_hub(tmp_path):
    """All 52,002 rows, from another folder, then again with nothing to do and no network."""
    with serve(hub(tmp_path, 52_002)) as (environment, _):
        assert "52,002 rows" in download(tmp_path, environment).stdout
    path = tmp_path / "deep" / "alpaca.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert len(rows) == 52_002
    assert rows[7] == {"instruction": "instruction 7 é", "input": "input 7 é",
                       "output": "output 7 é"}
    before = path.stat().st_mtime_ns
    assert "already whole" in download(tmp_path, environment).stdout  # the server is gone
    assert path.stat().st_mtime_ns == before
    path.write_text("[]")
    assert_user_error(download(tmp_path, environment, check=False), "alpaca.json", "--out")
    assert path.read_text() == "[]"


def test_a_bad_network_gives_the_same_file(tmp_path):
    """The real `datasets` client, its connections dropped, cut, refused for now, or answered with
    an error."""
    files, written = hub(tmp_path, 52_002), {}
    for name, faults in (("calm", []), ("stormy", [503, "drop", "cut", 429, 500, "cut"])):
        (tmp_path / name).mkdir()
        with serve(files, faults=faults) as (environment, pending):
            download(tmp_path / name, environment, "--retry-wait", 0.01)
        assert not pending  # every fault was met
        written[name] = (tmp_path / name / "deep" / "alpaca.json").read_bytes()
    assert written["calm"] == written["stormy"]


@pytest.mark.parametrize("repos, words", [
    (lambda tmp: hub(tmp, 100), ["100 rows", "52,002"]),
    (lambda tmp: hub(tmp, 52_002, columns=("instruction", "answer")), ["answer", "output"]),
    (lambda tmp: {}, ["tatsu-lab/alpaca"])])
def test_another_set_is_refused(tmp_path, repos, words):
    with serve(repos(tmp_path)) as (environment, _):
        result = download(tmp_path, environment, check=False)
    assert_user_error(result, *words)
    assert not list(tmp_path.glob("deep/*"))
