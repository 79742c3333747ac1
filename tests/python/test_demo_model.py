"""The demo model: tokenizer, export, transformers parity, resumable training."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from framequilt.demo.card import same_limit  # noqa: E402
from framequilt.demo.evaluate import Score  # noqa: E402
from framequilt.demo.export import export, hf_config, hf_names, load_checkpoint, own_names  # noqa: E402
from framequilt.demo.lm_data import Plan, video_batch  # noqa: E402
from framequilt.demo.lm_train import LmRun, shared_forward, visual_rows  # noqa: E402
from framequilt.demo.merging import compact, merge_runs  # noqa: E402
from framequilt.demo.model import DemoConfig, DemoModel  # noqa: E402
from framequilt.demo.scenes import QA, make_world  # noqa: E402
from framequilt.demo.tokenizer import SPECIAL, VOCAB_SIZE, Prompts  # noqa: E402

SMALL = DemoConfig(tower_layers=1, width=64, layers=2, heads=2, kv_heads=1, mlp=64)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts()


def test_every_text_round_trips(prompts: Prompts) -> None:
    texts = [string.printable, "naïve café, 你好 🙂 — ½", "  two  spaces\n\n\ttab ", "I'm 12345!"]
    texts += [q.question for seed in range(50) for q in make_world(seed, 8)[1]]
    for text in texts:
        assert prompts.tokenizer.decode(prompts.encode(text)) == text


def test_special_tokens_are_single_and_the_vocabulary_fits(prompts: Prompts) -> None:
    assert all(len(prompts.encode(s)) == 1 for s in SPECIAL)
    assert prompts.tokenizer.get_vocab_size() <= VOCAB_SIZE
    assert max(prompts.encode("".join(SPECIAL) + string.printable)) < VOCAB_SIZE


def test_split_prompts_equal_the_whole_prompt(prompts: Prompts) -> None:
    whole = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<image>\nhow many shapes are there?<|im_end|>\n<|im_start|>assistant\n"
    )
    image = prompts.encode("<image>")
    parts = prompts.prefix + image + prompts.question("how many shapes are there?")
    assert prompts.encode(whole) == parts


def test_the_chat_template_gives_the_training_prompt(tmp_path: Path, prompts: Prompts) -> None:
    transformers = pytest.importorskip("transformers")
    export(DemoModel(SMALL), prompts, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    content = [{"type": "video"}, {"type": "text", "text": "which digit is shown?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    image = prompts.encode("<image>")
    assert prompts.encode(text) == prompts.prefix + image + prompts.question(
        "which digit is shown?"
    )
    assert tokenizer(text)["input_ids"] == prompts.encode(text)


def test_export_and_load_keep_every_weight(tmp_path: Path, prompts: Prompts) -> None:
    model = DemoModel(SMALL)
    export(model, prompts, tmp_path)
    again, _ = load_checkpoint(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.bfloat16().float()), name
    assert own_names(hf_names(model.state_dict())).keys() == model.state_dict().keys()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == SMALL.tower_layers + 1


def test_language_model_logits_equal_transformers_qwen2(prompts: Prompts) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    own = DemoModel(DemoConfig()).eval()
    config = hf_config(own.config, prompts)
    keep = {k: v for k, v in config.items() if not k.startswith(("mm_", "vision", "torch_"))}
    keep.pop("model_type")
    qwen = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**keep)).float().eval()
    weights = hf_names(own.state_dict())
    language = {
        k: v for k, v in weights.items() if not any(p in k for p in ("vision", "mm_", "image_"))
    }
    missing, unexpected = qwen.load_state_dict(language, strict=False)
    assert not missing and not unexpected
    x = torch.randn(1, 90, own.config.width)
    with torch.no_grad():
        mine = own.language(x, torch.arange(90)[None])
        theirs = qwen(inputs_embeds=x).logits
    assert (mine - theirs).abs().max() < 1e-5


def test_tower_equals_transformers_siglip() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    own = DemoModel(DemoConfig()).eval()
    config = transformers.SiglipVisionConfig(**hf_config(own.config, Prompts())["vision_config"])
    tower = transformers.SiglipVisionModel(config).eval()
    prefix = "model.vision_tower.vision_tower."
    weights = {
        k.removeprefix(prefix): v
        for k, v in hf_names(own.state_dict()).items()
        if k.startswith(prefix)
    }
    names = set(tower.state_dict())
    if not any(n.startswith("vision_model.") for n in names):
        weights = {k.removeprefix("vision_model."): v for k, v in weights.items()}
    _, unexpected = tower.load_state_dict(weights, strict=False)
    assert not unexpected
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        theirs = tower(pixel_values=images, output_hidden_states=True).hidden_states[-2]
        mine = own.vision.tower(images)
    assert (mine - theirs).abs().max() < 1e-4


def test_shared_video_prefix_equals_single_turn_prompts(prompts: Prompts) -> None:
    model = DemoModel(SMALL).eval()
    batch = video_batch(SMALL, prompts, Plan(mix={"4": 1.0}), 3, 0.1)
    with torch.no_grad():
        rows = visual_rows(model, batch, False).flatten(1, 2)
        head = model.language.embed_tokens(torch.tensor(prompts.prefix)).expand(len(rows), -1, -1)
        prefix = torch.cat([head, rows], 1)
        n = prefix.shape[1]
        positions = torch.arange(n).expand(len(rows), n)
        tokens = torch.from_numpy(batch.tokens)
        valid = torch.ones(len(rows), n, dtype=torch.bool)
        shared, _ = shared_forward(model, prefix, positions, valid, tokens, n)
        for j in range(tokens.shape[1]):
            own = torch.cat([prefix[0], model.language.embed_tokens(tokens[0, j])])[None]
            alone = model.language(own, torch.arange(own.shape[1])[None])[0, n:]
            assert (alone - shared[0, j]).abs().max() < 1e-5


def test_a_run_may_start_from_an_exported_checkpoint(tmp_path: Path, prompts: Prompts) -> None:
    from framequilt.demo.train import begin_from

    torch.manual_seed(5)
    export(DemoModel(SMALL), prompts, tmp_path / "checkpoint", threshold=0.75)
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config["framefusion_similarity_lower_bound"] == 0.75
    (tmp_path / "run").mkdir()
    begin_from(tmp_path / "checkpoint", tmp_path / "run")
    stored, _ = load_checkpoint(tmp_path / "checkpoint")
    work = LmRun(tmp_path / "run", stored.config)
    assert work.step == 0
    for name, weight in work.model.state_dict().items():
        assert torch.equal(weight, stored.state_dict()[name]), name


def test_runs_of_similar_rows_become_their_mean() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.0, 3.0]]).view(1, 4, 1, 2)
    merged, starts = merge_runs(rows, 0.9)
    assert starts.flatten().tolist() == [True, False, True, False]
    kept, index, valid = compact(merged.flatten(1, 2), starts.flatten(1))
    assert torch.allclose(kept[0], torch.tensor([[0.95, 0.05], [0.0, 2.0]]))
    assert index.tolist() == [[0, 2]] and bool(valid.all())


def test_two_and_two_steps_equal_four(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    mix = {"1": 0.2, "4": 0.3, "8": 0.5}
    plan = json.dumps({"mix": mix, "merge": 0.5, "drop": 0.5, "fused": 0.5, "rank": 0.1})
    for name in "ab":
        (tmp_path / name / "control.json").write_text(plan)

    def steps(folder: str, count: int) -> LmRun:
        run = LmRun(tmp_path / folder, SMALL, scale=0.13)
        run.threshold = 0.95
        for _ in range(count):
            run.update(run.make(run.step))
        run.save()
        return run

    whole = steps("a", 4)
    steps("b", 2)
    halves = steps("b", 2)
    assert whole.step == halves.step == 4
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, halves.model.state_dict()[name]), name


def test_a_fused_batch_teaches_answers_and_where_to_look(tmp_path: Path) -> None:
    deeper = replace(SMALL, layers=5)
    run = LmRun(tmp_path, deeper, scale=0.25)
    run.step = 80  # behind the warm-up
    run.threshold = 0.999  # a fresh tower: hardly anything merges, so that pruning happens
    plan = Plan(mix={"8": 1.0}, fused=1.0, fused_questions=3, rank=1.0, aux=0.0, lr=3e-3)
    batch = video_batch(deeper, run.prompts, plan, 5, 0.25)
    first = run.update(batch)
    assert int(first["mode"]) == 2
    assert not bool(first["right"][:, 3:].any())
    for _ in range(20):
        last = run.update(batch)
    for name in ("loss_answer_fused", "loss_rank"):
        assert float(last[name].detach()) < 0.9 * float(first[name].detach()), name


def test_the_card_counts_the_two_questions_of_same_apart() -> None:
    score = Score()
    for hit, answer in ((True, "yes"), (False, "no"), (True, "yes"), (True, "red cross")):
        score.add(QA("same", "", answer), hit, None)
    found = score.to_dict()
    assert found["same"] == {"scene": {"hits": 2, "n": 3}, "still": {"hits": 1, "n": 1}}
    assert found["kinds"]["same"]["accuracy"] == 0.75
    text = " ".join(" ".join(same_limit({"costs": {"1.0": found, "0.3": found}})).split())
    assert "1 of 1 (1 of 1 with FrameFusion)" in text
    assert "2 of 3 (2 of 3 with FrameFusion), no more than always answering yes" in text
