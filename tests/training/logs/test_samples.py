"""The model in training answers held-out prompts, as the finished model would."""

from pathlib import Path

from svdconvert import Run, train
from tests.stock import same_bytes, tensors
from tests.training.small_runs import LORA, json_lines, text_options


def test_the_model_answers_held_out_prompts_at_every_evaluation(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "out", text_options(base, samples=2, sample_tokens=5), Run(threads=1), split=LORA)
    answers = json_lines(tmp_path / "out" / "samples.jsonl")
    assert [answer["step"] for answer in answers] == [0, 0, 2, 2, 4, 4]
    assert all(answer.keys() == {"step", "prompt", "response"} for answer in answers)
    assert answers[0]["prompt"] == answers[2]["prompt"] != answers[1]["prompt"]
    assert "what is" in str(answers[0]["prompt"])
    assert all(len(str(answer["response"]).split()) <= 5 for answer in answers)
    train(base, tmp_path / "silent", text_options(base), Run(threads=1), split=LORA)
    # asking changes nothing
    assert same_bytes(tensors(tmp_path / "out"), tensors(tmp_path / "silent"))
    assert not (tmp_path / "silent" / "samples.jsonl").exists()


def test_the_last_answers_are_those_of_the_trained_model(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = {"samples": 1, "sample_tokens": 6, "steps": 12, "precision": "fp32"}
    train(base, tmp_path / "out", text_options(base, **arguments), Run(threads=1), split=LORA)
    tokenizer = AutoTokenizer.from_pretrained(base)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    last = json_lines(tmp_path / "out" / "samples.jsonl")[-1]
    ids = tokenizer(last["prompt"], add_special_tokens=False, return_tensors="pt")
    made = stock.generate(**ids, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=2)
    expected = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert last["response"] == expected
