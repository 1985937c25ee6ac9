"""lm-eval's scores on the shipped tasks against the same likelihoods computed directly, for several widths."""

import json
import math

import pytest
import torch
from shared import SMALL, TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from matquant.errors import UserError
from matquant.evaluate import docstrings
from matquant.evaluate.tasks import Tasks, evaluate_tasks, recovery
from matquant.models.blocks import BlockModel

pytestmark = pytest.mark.slow

ITEMS = 4


def steps(weight, count):
    """Weights rounded to a few levels, so that a variant's scores are its own."""
    scale = weight.float().abs().amax() / count
    return ((weight.float() / scale).round() * scale).to(weight.dtype)


@pytest.fixture(scope="module")
def scored():
    blocks = BlockModel(AutoModelForCausalLM.from_pretrained(TINY, dtype="auto").eval())
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tasks = Tasks(docstrings.NAMES, None, fewshot=0)

    def weights_of(index, variant):
        linears = blocks.linears(index) if index < len(blocks) else {}
        return {name: steps(layer.weight, int(variant)) for name, layer in linears.items()}

    found = evaluate_tasks(
        tasks, blocks, tokenizer, weights_of, ["4", "16"], limit=ITEMS, batch_size=4, device=torch.device("cpu")
    )
    return dict(found), tokenizer, tasks


def model_of(variant):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="auto").eval()
    if variant != "full":
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "layers" in name:
                module.weight = torch.nn.Parameter(steps(module.weight, int(variant)))
    return model.float()


@torch.no_grad()
def likelihoods(model, ids):
    """Log-probability of each token but the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("variant", ["full", "4", "16"])
def test_scores_are_those_of_the_same_likelihoods(scored, variant):
    found, tokenizer, _ = scored
    model = model_of(variant)

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    right, right_by_length = [], []
    for row in docstrings.choices("evaluation")[:ITEMS]:
        start = len(encode(row["head"]))
        sums = [likelihoods(model, encode(row["head"] + c))[start - 1 :].sum().item() for c in row["choices"]]
        by_length = [s / len(c) for s, c in zip(sums, row["choices"], strict=True)]
        right.append(sums.index(max(sums)) == row["answer"])
        right_by_length.append(by_length.index(max(by_length)) == row["answer"])
    scores = found[variant]["stdlib_choice"]
    assert scores["acc"] == pytest.approx(sum(right) / ITEMS)
    assert scores["acc_norm"] == pytest.approx(sum(right_by_length) / ITEMS)
    p = scores["acc"]
    assert scores["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (ITEMS - 1)))

    total, size = 0.0, 0
    for text in docstrings._whole("evaluation")[:ITEMS]:
        ids = [tokenizer.bos_token_id, *encode(text)]
        assert len(ids) <= 512  # one window of the model
        total += likelihoods(model, ids).sum().item()
        size += len(text.encode())
    assert found[variant]["stdlib_docstrings"]["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-4)


@pytest.mark.parametrize("task", docstrings.NAMES)
def test_logits_that_are_not_finite_end_a_task(task):
    blocks = BlockModel(AutoModelForCausalLM.from_pretrained(TINY, dtype="auto").eval())
    name = "model.layers.0.mlp.down_proj"
    broken = {name: torch.full_like(blocks.linears(0)[name].weight, torch.nan)}
    scores = evaluate_tasks(
        Tasks([task], None, fewshot=0),
        blocks,
        AutoTokenizer.from_pretrained(TINY),
        lambda index, variant: broken if (index, variant) == (0, "3") else {},
        ["3"],
        limit=1,
        batch_size=4,
        device=torch.device("cpu"),
    )
    assert next(scores)[0] == "full"
    with pytest.raises(UserError, match="logits of the slice of 3 bits hold NaN or Inf"):
        next(scores)


def test_slices_differ_and_recovery_is_a_share_of_full_precision(scored):
    found, _, _ = scored
    bits = {name: scores["stdlib_docstrings"]["bits_per_byte"] for name, scores in found.items()}
    assert bits["4"] > bits["16"] > 0
    kept = recovery(found["4"], found["full"])
    assert kept["stdlib_docstrings/bits_per_byte"] == pytest.approx(100 * bits["full"] / bits["4"])
    assert recovery({"t": {"acc": 0.4, "acc_stderr": 0.1}}, {"t": {"acc": 0.5}}) == {"t/acc": pytest.approx(80)}
    assert recovery({"t": {"acc": 0.4}}, {"t": {"acc": 0.0}}) == {}


def test_questions_have_one_answer_each_and_are_always_the_same():
    rows = docstrings.choices("evaluation")
    assert len(rows) > 50
    assert rows == docstrings.choices("evaluation")
    for row in rows:
        assert len(set(row["choices"])) == 4
        assert row["head"].endswith('"""')
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}


def test_few_shot_examples_come_before_the_question(scored):
    _, _, plain = scored
    shots = Tasks(["stdlib_choice"], None, fewshot=2)
    contexts = []
    for tasks in (plain, shots):
        task = tasks.loaded["tasks"]["stdlib_choice"]
        contexts.append(task.fewshot_context(task.test_docs()[0], num_fewshot=task.config.num_fewshot))
    assert str(contexts[1]).endswith(str(contexts[0]))
    assert len(str(contexts[1])) > len(str(contexts[0]))


def test_local_task_files(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"q": "def f", "c": ["(", ")"], "a": 0}) + "\n")
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}, "
        f"cache_dir: {tmp_path}/cache}}\noutput_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_choice: '{{c}}'\ndoc_to_target: a\n"
    )
    assert list(Tasks(["mine"], str(tmp_path), None).loaded["tasks"]) == ["mine"]
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        Tasks(["mine"], str(tmp_path), None)
    with pytest.raises(UserError, match="is not a folder"):
        Tasks(["mine"], str(tmp_path / "nowhere"), None)


def test_a_job_puts_scores_errors_and_recovery_into_its_results(matquant, small_model, tmp_path):
    status, _, err = matquant(
        *SMALL,
        f"model.path={small_model}",
        "method=rtn",
        "method.per_bit_models=false",
        "method.group_size=64",
        "bits=[2,8]",
        "eval=offline_tasks",
        "eval.tasks=[stdlib_choice]",
        "eval.limit=3",
        "eval.datasets.stdlib.sequences=2",
    )
    assert status == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["baseline"]["tasks"]["stdlib_choice"].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert [entry["tasks"].keys() for entry in results["slices"]] == [{"stdlib_choice"}] * 2
    assert (
        "stdlib_choice/acc" in results["slices"][1]["recovery"]
        or not results["baseline"]["tasks"]["stdlib_choice"]["acc"]
    )
