"""Comparison of policies: estimators by hand, KL against enumeration, any number of ranks."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.common import CPU_LAUNCH, main_error, run_script, write_rows
from helpers.ranks import Ranks

import judge
from dataloader import Prompt, pad_rows
from image.plot_report import binary_kl
from inference import logprobs
from judge import best_of_n, plain, repeated_4grams, response_figures, response_loss, win_rate
from minigpt2.advantages import response_targets
from minigpt2.checkpoint import load_model, save_checkpoint
from minigpt2.distributed import Launch
from minigpt2.rewards import RewardModel
from minigpt2.sampling import Response
from minigpt2.tokenizer import EOT_TOKEN, encode, encode_example, format_prompt
from model import GPT, GPTConfig

SIZES = GPTConfig(block_size=128, n_layer=2, n_head=2, n_embd=16)
REFERENCES = ("Paris.", "It is a city in the north of France.", "yes", "Blue, of course!", "4")
ROWS = [{"instruction": f"Question {n}?", "input": "It is short." * (n % 2),
         "output": REFERENCES[n % 5]} for n in range(40)]


def make_policy(stop: float) -> GPT:
    """A model that says <|endoftext|> with a logit of about `stop`; all others are near 0."""
    torch.manual_seed(0)
    model = GPT(SIZES).eval()
    with torch.no_grad():
        end = model.transformer.wte.weight[EOT_TOKEN]
        end *= 5
        model.transformer.ln_f.bias += stop * end / end.square().sum()
    return model


@pytest.fixture
def files(tmp_path):
    for name, stop in (("sft", 10.8), ("copy", 10.8), ("rlhf", 12.0)):  # they stop at .5, .5, .8
        save_checkpoint(tmp_path / name, 1, make_policy(stop))
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rewards.py").write_text("def words(row, text):\n    return len(text.split())\n"
                                         "def nothing(row, text):\n    return float('nan')\n")
    return tmp_path


def arguments(files, *more) -> list[str]:
    return ["--data", str(files / "rows.jsonl"), "--out-dir", str(files / "out"), "--device", "cpu",
            "--val-fraction", "0.5", "--max-tokens", "5", *map(str, more)]


def samples_of(files) -> list[dict]:
    lines = (files / "out" / "samples.jsonl").read_text().splitlines()
    return list(map(json.loads, lines))


def results_of(files, monkeypatch, *more) -> dict[str, dict]:
    """The results of a run in this process."""
    monkeypatch.setattr("sys.argv", ["judge.py", *arguments(files, *more)])
    judge.main()
    return json.loads((files / "out" / "judge.json").read_text())["results"]


# ------------------------------------------------------------------------------ by hand


def tensor(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_best_of_n_by_hand():
    proxy, gold = tensor([3, 1, 2, 0]), tensor([10, 20, 30, 40])  # by rank: 40, 20, 30, 10
    assert best_of_n(proxy, gold, 1).tolist() == [25]  # the mean
    assert best_of_n(proxy, gold, 4).tolist() == [10]  # the gold of the largest proxy
    assert best_of_n(proxy, gold, 2).item() == pytest.approx((1 * 20 + 2 * 30 + 3 * 10) / 6)
    tied, gold = tensor([1, 1, 0], [0, 0, 0]), tensor([6, 0, 9], [1, 2, 6])
    assert best_of_n(tied, gold, 3).tolist() == [3, 3]  # either of the best, with equal chances
    assert best_of_n(tied, gold, 1).tolist() == [5, 3]


def test_best_of_n_is_the_mean_over_all_subsets():
    torch.manual_seed(0)
    proxy, gold = torch.randint(4, (3, 6)).double(), torch.randn(3, 6, dtype=torch.float64)
    for n in range(1, 7):
        subsets = list(itertools.combinations(range(6), n))
        for row in range(3):
            total = 0.0
            for subset in subsets:
                best = max(proxy[row, i] for i in subset)
                golds = [gold[row, i].item() for i in subset if proxy[row, i] == best]
                total += sum(golds) / len(golds)
            assert best_of_n(proxy, gold, n)[row].item() == pytest.approx(total / len(subsets))


def test_binary_kl_by_hand():
    p, q = tensor(0.5, 0.451, 0.1, 0, 1), tensor(0.1, 0.1, 0.1, 0.1, 0.1)
    # 0.408: the KL of the best policy at beta 0.5 from a success rate of 0.1
    assert binary_kl(p, q).tolist() == pytest.approx(
        [0.510826, 0.408, 0, -math.log(0.9), math.log(10)], abs=5e-4)
    assert binary_kl(tensor(0, 1, 0.5), tensor(0, 1, 0)).tolist() == [0, 0, math.inf]


def test_win_rates_by_hand():
    """Three prompts: a win, a tie, a loss. All pairs of responses to a prompt count."""
    figures = win_rate(tensor([2, 1, 0]), tensor([1, 1, 1]))
    assert figures["win_rate"] == 0.5
    low, high = figures["win_rate_interval"]
    assert 0 <= low < 0.5 < high <= 1
    assert win_rate(tensor([2], [0]), tensor([1], [0]))["win_rate"] == pytest.approx(2.5 / 4)
    same = torch.randn(3, 50, dtype=torch.float64)
    assert win_rate(same, same) == {"win_rate": pytest.approx(0.5, abs=1e-12), "win_rate_interval":
                                    pytest.approx([0.5, 0.5], abs=1e-12)}


def test_the_interval_of_a_win_rate_is_that_of_a_share():
    """240 wins of 400: 0.6 +- 1.96 sqrt(0.24 / 400) = 0.048."""
    wins = (torch.arange(400) < 240).double()[None]
    figures = win_rate(wins, torch.full_like(wins, 0.5))
    assert figures["win_rate"] == pytest.approx(0.6)
    assert figures["win_rate_interval"] == pytest.approx([0.552, 0.648], abs=0.006)


def test_repetition_and_plain_answers_by_hand():
    assert repeated_4grams("a b c d a b c d") == pytest.approx(1 / 5)  # of abcd bcda cdab dabc abcd
    assert repeated_4grams("no no no no no no") == pytest.approx(2 / 3)
    assert repeated_4grams("three words only") == repeated_4grams("") == 0
    assert repeated_4grams("one two three four five") == 0
    assert plain(" The  Capital is\nPARIS. ") == "the capital is paris" == plain(
        "the capital is Paris !")
    assert plain("C++") == "c++" and plain("3.5") == "3.5" != plain("35")


def prompt(output: str) -> Prompt:
    return Prompt("row 1", "Q", "", output, encode(format_prompt("Q")))


def test_figures_of_responses_by_hand():
    """Two responses to each of three prompts, of which the second has a long reference."""
    prompts = [prompt("Paris."), prompt("We do not know that at all."), prompt("no")]
    texts = (("paris", True), ("so so so so so so", False), ("yes", True),
             ("PARIS!", True), ("We do not know that at all.", True), ("no", False))
    responses = [Response([1], encode(text) + [EOT_TOKEN] * stops, "stop" if stops else "length")
                 for text, stops in texts]
    figures = response_figures(responses, prompts * 2)
    assert figures["stopped"] == [stops for _, stops in texts]
    assert figures["tokens"] == [len(encode(text)) for text, _ in texts]
    assert figures["repeated_4grams"] == pytest.approx([0, 2 / 3, 0, 0, 0, 0])
    values = {name: torch.tensor(row, dtype=torch.float64).view(2, 3)
              for name, row in figures.items()}
    summary = judge.summarize(values, prompts)
    assert summary["exact_match"] == pytest.approx(3 / 4)  # of the short ones: 1, 0, 1, 1
    assert summary["stopped"] == pytest.approx(4 / 6)
    assert summary["stopped_stderr"] == pytest.approx(  # over the means of the prompts
        torch.tensor([1, 0.5, 0.5]).std().item() / math.sqrt(3))
    assert "exact_match" not in judge.summarize({name: row[:, 1:2] for name, row in values.items()},
                                                prompts[1:2])


def test_the_response_loss_is_the_mean_over_all_tokens():
    """As in fine-tuning. References that do not fit are left out, as are prompts without one."""
    model, outputs = make_policy(5.0), [*REFERENCES, "", "<nooutput>", "word " * 200]
    pairs = [encode_example("Q", "", output) for output in REFERENCES]
    ids, masks = pad_rows([context + response for context, response in pairs])
    starts = torch.tensor([len(context) for context, _ in pairs])
    with torch.no_grad():
        expected = model(ids, response_targets(ids, starts, masks.sum(1)))[1].item()
    figures = response_loss(model, list(map(prompt, outputs)), CPU_LAUNCH, 128)
    assert figures["response_loss"] == pytest.approx(expected, abs=1e-5)
    assert response_loss(model, list(map(prompt, outputs[-3:])), CPU_LAUNCH, 128) == {}


# ---------------------------------------------------------------------------- divergence


def test_a_copy_has_no_divergence_and_wins_half(files, monkeypatch):
    """Exactly: the policies sample with equal seeds, and their scores are made alike."""
    compared = []
    monkeypatch.setattr(Launch, "check_same", lambda self, facts, except_for=(): compared.append(
        (facts.keys(), set(except_for))))
    results = results_of(files, monkeypatch, files / "sft", files / "copy", "--samples", "3",
                         "--best-of", "4", "--proxy", f"{files / 'rewards.py'}:words")
    sft, copy = results[str(files / "sft")], results[str(files / "copy")]
    assert copy["kl"] == copy["kl_stderr"] == 0 and "kl" not in sft
    assert copy["win_rate"] == pytest.approx(0.5, abs=1e-12)
    assert copy["win_rate_interval"] == pytest.approx([0.5, 0.5], abs=1e-12)
    assert copy["response_loss"] == sft["response_loss"]
    assert 0.2 < copy["stopped"] < 1
    (run, paths), *policies = compared  # the newest checkpoint may be another on a later rank
    assert "data_sha256" in run and paths == {"data"} and policies == [
        ({"weights", "--dtype"}, set())] * 2


def test_the_divergence_is_that_of_an_enumeration(files, monkeypatch):
    """With one new token, the exact KL is a sum over the vocabulary."""
    results = results_of(files, monkeypatch, files / "sft", files / "rlhf", "--samples", "20",
                         "--max-tokens", "1")[str(files / "rlhf")]
    lines = samples_of(files)
    ids, masks = pad_rows([encode(line["prompt"]) for line in lines])
    last = torch.arange(len(ids)), masks.sum(1) - 1
    with torch.no_grad():
        policy, reference = (load_model(files / name)(ids)[0][last].double().log_softmax(1)
                             for name in ("rlhf", "sft"))
    exact = (policy.exp() * (policy - reference)).sum(1).mean().item()
    assert len(lines) == 18 and exact > 0.1 and results["kl_stderr"] < exact / 4
    assert abs(results["kl"] - exact) < 4 * results["kl_stderr"]


def test_the_divergence_is_summed_over_the_response(files, monkeypatch):
    """Over all its tokens and none of the prompt's: directly, from log-probabilities."""
    taken, sample = [], judge.sample_responses

    def record(*given, **options):
        taken.append(sample(*given, **options))
        return taken[-1]

    monkeypatch.setattr(judge, "sample_responses", record)
    results = results_of(files, monkeypatch, files / "sft", files / "rlhf")
    sums, models = [], [load_model(files / name) for name in ("rlhf", "sft")]
    for response in taken[1]:
        row = pad_rows([response.prompt + response.tokens])
        ours, theirs = (logprobs(model, *row)[0, len(response.prompt) - 1 :] for model in models)
        sums.append((ours - theirs).sum().item())
    assert len({len(response.tokens) for response in taken[1]}) > 2
    assert results[str(files / "rlhf")]["kl"] == pytest.approx(sum(sums) / len(sums), abs=1e-4)


# ----------------------------------------------------------------------------- the script


@pytest.mark.slow
def test_the_script_compares_and_draws(files):
    """As a process, with a verifiable reward: all numbers, files and the table."""
    run = run_script("judge.py", *arguments(
        files, files / "sft", files / "rlhf", "--gold", "function:stops", "--proxy",
        f"{files / 'rewards.py'}:words", "--best-of", "5", "--samples", "2"))
    report = json.loads((files / "out" / "judge.json").read_text())
    results, flags = report["results"], report["flags"]
    assert flags.keys() >= {"seed", "torch", "git_commit"}  # what reproduces it
    sft, rlhf = results[str(files / "sft")], results[str(files / "rlhf")]
    assert flags["best_of"] == 5 and 10 < report["prompts"] < 30
    assert list(results)[2:] == [f"best of {n}" for n in (1, 2, 4, 5)]
    for kind in ("proxy", "gold"):
        assert results["best of 1"][kind] == pytest.approx(sft[kind])
    assert results["best of 1"]["kl_upper_bound"] == 0
    assert results["best of 2"]["kl_upper_bound"] == pytest.approx(0.193, abs=5e-4)
    assert results["best of 5"]["proxy"] > results["best of 2"]["proxy"] > sft["proxy"]
    assert rlhf["gold"] == rlhf["stopped"] > sft["stopped"] == sft["gold"]  # the rate of success
    assert rlhf["kl_lower_bound"] == pytest.approx(
        binary_kl(tensor(rlhf["gold"]), tensor(sft["gold"])).item())
    assert sft["kl_lower_bound"] == 0 < rlhf["kl"]
    assert rlhf["win_rate"] > 0.5 and rlhf["win_rate_interval"][1] > rlhf["win_rate"]
    lines = samples_of(files)
    assert len(lines) == min(20, report["prompts"])
    for line in lines:
        assert line["prompt"].startswith("Below is") and line["reference"] in REFERENCES
        assert list(line["responses"]) == [str(files / "sft"), str(files / "rlhf")]
        for one in line["responses"].values():
            assert one["gold"] == one["stopped"] == one["text"].endswith("<|endoftext|>")
    image = files / "out" / "judge.png"
    assert image.read_bytes().startswith(b"\x89PNG")
    table = run.stdout.splitlines()
    assert any(line.split()[:2] == ["gold", f"{sft['gold']:.4f}"] for line in table)
    assert any(line.startswith("win_rate ") and " to " in line for line in table)
    image.unlink()
    run_script("image/plot_report.py", files / "out" / "judge.json", "--out", image)
    assert image.read_bytes().startswith(b"\x89PNG")
    del report["results"][str(files / "rlhf")]["kl"]  # as at another temperature than 1
    (files / "cold.json").write_text(json.dumps(report))
    for wrong in ("rows.jsonl", "cold.json"):
        broken = run_script("image/plot_report.py", files / wrong, "--out", image, check=False)
        assert broken.returncode == 2 and "is not a report of" in broken.stderr


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_figures(files):
    save_checkpoint(files / "reward", 1, RewardModel.from_language_model(make_policy(0.0), 0))
    results = {}
    for world_size in (1, 2):
        ranks = Ranks(world_size, "judge", arguments(
            files, files / "sft", files / "rlhf", "--proxy", files / "reward", "--best-of", "4",
            "--samples", "2"), files / f"ranks{world_size}")
        assert ranks.wait() == [0] * world_size, ranks.output()
        results[world_size] = [(files / "out" / name).read_text().replace(
            f'"world_size": {world_size}', '"world_size": 0')
            for name in ("judge.json", "samples.jsonl")]
    assert results[1] == results[2]
    proxy = json.loads(results[1][0])["results"][str(files / "rlhf")]
    assert proxy["proxy"] != -1 and proxy["proxy_stderr"] > 0


def test_one_checkpoint_without_a_reward(files, monkeypatch, capsys):
    """Greedy answers, of base models too; a line says that there is no KL."""
    results = results_of(files, monkeypatch, files / "sft", "--temperature", "0", "--rows", "3")
    assert set(results) == {str(files / "sft")}
    figures = {name for name in results[str(files / "sft")] if not name.endswith("_stderr")}
    assert figures == {"tokens", "stopped", "repeated_4grams", "exact_match", "response_loss"}
    report = json.loads((files / "out" / "judge.json").read_text())
    assert report["prompts"] == 3 and not (files / "out" / "judge.png").exists()
    assert "no KL" not in capsys.readouterr().out
    results_of(files, monkeypatch, files / "sft", files / "rlhf", "--temperature", "0")
    assert "--temperature 0.0: no KL" in capsys.readouterr().out


def test_prompts_of_pairs_and_conversations_are_judged(files, monkeypatch):
    chat = [{"messages": [{"role": "user", "content": f"Who is {n}?"},
                          {"role": "assistant", "content": "You."}]} for n in range(10)]
    pairs = [{"prompt": f"What is {n}?", "chosen": "A thing.", "rejected": "No."}
             for n in range(10)]
    write_rows(files / "rows.jsonl", chat + pairs)
    results_of(files, monkeypatch, files / "sft")
    lines = samples_of(files)
    assert {line["reference"] for line in lines} == {"You.", "A thing."}


def test_all_rows_of_a_test_file_may_be_judged(files, monkeypatch):
    """Nothing is trained, so none must be left."""
    write_rows(files / "rows.jsonl", ROWS[:1])
    results_of(files, monkeypatch, files / "sft", "--val-fraction", "1")
    assert len(samples_of(files)) == 1


def test_policies_of_other_contexts_are_compared_on_the_same_rows(files, monkeypatch, capsys):
    """The shortest context of all, also of rewards: the same weights have the same loss."""
    policy = make_policy(10.8)
    policy.config = replace(SIZES, block_size=72)
    policy.transformer.wpe.weight = torch.nn.Parameter(policy.transformer.wpe.weight[:72])
    save_checkpoint(files / "short", 1, policy)
    rows = [row | {"output": "so " * (40 * (n % 2)) + "."} for n, row in enumerate(ROWS)]
    write_rows(files / "rows.jsonl", rows)
    results = results_of(files, monkeypatch, files / "sft", files / "short")
    loss, other = (results[str(files / name)]["response_loss"] for name in ("sft", "short"))
    assert loss == pytest.approx(other, abs=1e-5)
    alone = results_of(files, monkeypatch, files / "sft")[str(files / "sft")]["response_loss"]
    assert abs(alone - loss) > 0.01
    save_checkpoint(files / "reward", 1, RewardModel.from_language_model(policy, 0))
    message = main_error(judge.main, arguments(files, files / "sft", "--proxy", files / "reward",
                                               "--max-tokens", "70"), monkeypatch, capsys)
    assert "in a context of 72" in message


def test_all_held_out_rows_count_in_the_loss_and_float32_in_the_divergence(files, monkeypatch):
    """Of the prompts, --rows takes a part; a --dtype is for sampling and rewards."""
    used, score = set(), judge.score
    monkeypatch.setattr(judge, "score", lambda model, pairs, launch, dtype, **options: (
        used.add(dtype), score(model, pairs, launch, dtype, **options))[1])
    monkeypatch.setattr(judge, "prepare_to_sample", lambda model, dtype: model)
    whole = results_of(files, monkeypatch, files / "sft", files / "rlhf")
    part = results_of(files, monkeypatch, files / "sft", files / "rlhf", "--rows", "3", "--dtype",
                      "bfloat16")
    for name in ("sft", "rlhf"):
        path = str(files / name)
        assert part[path]["response_loss"] == pytest.approx(whole[path]["response_loss"], abs=1e-6)
    assert used == {torch.float32}


def test_mistakes_are_named(files, monkeypatch, capsys):
    def error(*more) -> str:
        return main_error(judge.main, arguments(files, *more), monkeypatch, capsys)

    sft, reward = files / "sft", files / "reward"
    save_checkpoint(reward, 1, RewardModel.from_language_model(make_policy(0.0), 0))
    assert "no checkpoint given" in error()
    assert "one twice" in error(sft, reward, sft)
    assert "needs --proxy" in error(sft, "--best-of", "4")
    assert "--temperature 1" in error(sft, "--best-of", "4", "--gold", "function:stops",
                                      "--temperature", "0.5")
    assert "is a reward model, expected a language model" in error(sft, reward)
    assert "is a language model, expected a reward model" in error(sft, "--proxy", sft)
    assert "--gold function:nothing: KeyError" in error(sft, "--gold", "function:nothing")
    assert "without room for 126 tokens" in error(sft, "--max-tokens", "126")
    assert "expected a finite number" in error(sft, "--proxy", f"{files / 'rewards.py'}:nothing")
    assert "cannot be written" in error(sft, "--out-dir", files / "rows.jsonl")
    assert "cannot read" in error(sft, "--data", files / "missing.json")
    write_rows(files / "rows.jsonl", [row | {"output": None} for row in ROWS])
    assert "rows have none" in error(sft, "--proxy", "function:contains")
    write_rows(files / "rows.jsonl", ROWS[:1])
    assert "--val-fraction" in error(sft)
    assert not (files / "out").exists()
