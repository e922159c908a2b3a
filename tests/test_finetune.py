"""`igpt finetune`: better on its own pictures, good for the old labels, stoppable at any moment, hard to break."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from train.newness import copies

import igpt
import train.finetune
from igpt.checkpoint import ADAPTER, load
from igpt.cli import main
from igpt.config import GPTConfig
from igpt.image_gpt import ImageGPT
from igpt.model import GPT
from igpt.token_cache import TokenCache
from tests.painting import COLOURS, art_folder, paint
from tokenizer_vq.base import UserError
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer
from train.collection import gather
from train.finetune import RESULT, SHEET, finetune
from train.folder import WORK
from train.loop import Schedule, run
from train.options import TuneOptions
from train.plan import Plan, Speeds, choose
from train.tune import BY_HEART, TuneStage, ranked_labels, rehearsal, together

USUAL = Speeds(crops=30, samples=15)
QUICK = TuneOptions(quiet=True, samples=400, views=4, batch=8, method="full", seed=1, decoder_crops=0)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def green(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of a colour that the base does not know."""
    folder = tmp_path_factory.mktemp("art") / "green"
    folder.mkdir()
    for i in range(12):
        paint(i, (40, 180, 60)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def tuned(green: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(green, tmp_path_factory.mktemp("tuned") / "greens", str(tiny_folder), QUICK)


def told(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / WORK / RESULT).read_text()))


# What it makes


def test_a_flat_folder_becomes_a_model_with_one_more_label_that_is_better_on_unseen_pictures(
    tuned: Path, tiny_folder: Path
) -> None:
    model, base = igpt.load(tuned, "cpu"), load(tiny_folder)
    assert model.labels == ["red", "blue", "green"] and model.native_cells == 16
    facts = told(tuned)
    assert facts["bits"] < 0.85 * facts["base_bits"], facts
    for label in (*model.labels, None):
        assert model.generate(size=24, label=label, seed=1)[0].size == (24, 24)
    assert model.provenance["base_hash"] == base.weights_hash and model.provenance["finetune"]["bits"] == facts["bits"]
    old, new = base.tokenizer.state_dict(), load(tuned).tokenizer.state_dict()
    assert all(torch.equal(old[key], new[key]) for key in old), "recipes and tokens of the base stay good"


def test_it_leaves_a_sheet_a_listing_and_a_card(tuned: Path) -> None:
    with Image.open(tuned / SHEET) as sheet:
        assert sheet.width > 8 * 160 and sheet.height > 3 * 160
    assert (tuned / "pictures.csv").read_text().count("learned from") == 10
    card = (tuned / "README.md").read_text()
    assert "fine-tuned" in card and "New labels: green." in card and "the base at its best" in card


def test_sub_folders_become_labels_and_known_names_add_to_the_known_ones(tiny_folder: Path, tmp_path: Path) -> None:
    art = art_folder(tmp_path / "art", each=5)
    (art / "blue").rename(art / "violet")
    out = finetune(art, tmp_path / "out", str(tiny_folder), replace(QUICK, samples=64, rehearse=0))
    assert igpt.load(out, "cpu").labels == ["red", "blue", "violet"]
    assert set(told(out)["nearest"]) == {"red", "violet"} and told(out)["nearest"]["red"] == "red"


def test_a_new_label_starts_from_the_known_one_that_finds_it_least_surprising(tiny_model: ImageGPT) -> None:
    generator = torch.Generator().manual_seed(0)
    grids = [torch.randint(32, (16,), generator=generator).to(torch.uint16) for _ in range(4)]
    plain = TokenCache(1, [0] * 4, [(4, 4)] * 4, grids)
    ranked = ranked_labels(tiny_model.gpt, plain, 0)
    assert [label for _, label in ranked] == [label for _, label in sorted(ranked)] and len(ranked) == 3
    from igpt.lora import with_labels

    best = ranked[0][1]
    wider = with_labels(tiny_model.gpt, tiny_model.gpt.labels.weight.detach()[[best]])
    assert torch.equal(wider.labels.weight[2], tiny_model.gpt.labels.weight[best])


def test_an_adapter_is_small_and_its_base_draws_with_it(green: Path, tiny_folder: Path, tmp_path: Path) -> None:
    options = replace(QUICK, adapter=True, method="lora", samples=64)
    out = finetune(green, tmp_path / "out", str(tiny_folder), options)
    assert (out / ADAPTER).stat().st_size <= 4_000_000 and not (out / "model.safetensors").exists()
    model = igpt.load(tiny_folder, "cpu", adapter=out / ADAPTER)
    assert model.labels == ["red", "blue", "green"] and model.name == "out"
    assert told(out)["bits"] < told(out)["base_bits"]
    assert model.labels_for(None, 0, 20) == ["green"] * 20, "what it was tuned on is what it draws"
    words = ["generate", "--model", str(tiny_folder), "--adapter", str(out / ADAPTER)]
    assert main([*words, "--size", "16", "--seed", "1", "--out", str(tmp_path), "--quiet"]) == 0
    assert (tmp_path / "green-1.png").is_file()


def test_the_library_hands_back_the_tuned_model(green: Path, tiny_folder: Path, tmp_path: Path) -> None:
    quick = {"samples": 16, "views": 2, "rehearse": 0, "quiet": True, "decoder_crops": 0}
    assert igpt.finetune(green, tmp_path / "out", tiny_folder, **quick).labels == ["red", "blue", "green"]
    with pytest.raises(UserError, match=r"no such option.*colour"):
        igpt.finetune(green, tmp_path / "new", tiny_folder, colour=1)


def test_forgetting_is_measured_on_the_art_of_the_base(green: Path, tiny_folder: Path, tmp_path: Path) -> None:
    old = art_folder(tmp_path / "old", each=10)
    options = replace(QUICK, samples=32, remember=str(old))
    facts = told(finetune(green, tmp_path / "out", str(tiny_folder), options))
    assert facts["forgetting_before"] > 0 and facts["forgetting_after"] > 0
    with pytest.raises(UserError, match="no held-out picture of a label that the base knows"):
        finetune(green, tmp_path / "again", str(tiny_folder), replace(options, remember=str(green)))


def test_what_the_base_draws_itself_is_learned_along_in_the_share_asked_for(tiny_model: ImageGPT) -> None:
    drawn = rehearsal(tiny_model.gpt, views=3, seed=0)
    assert (len(drawn), drawn.labels) == (2, [0, 1])
    own = TokenCache(3, [2] * 10, [(4, 4)] * 30, [torch.zeros(16, dtype=torch.uint16)] * 30)
    for share in (0.1, 0.5, 0.8):
        both, pictures = together(own, drawn, range(10), share)
        assert sum(p >= 10 for p in pictures) / len(pictures) == pytest.approx(share, abs=0.08)
        assert {both.labels[p] for p in pictures} <= {0, 1, 2}
    assert together(own, drawn, range(10), 0.0)[1] == list(range(10))


def test_the_decoder_learns_the_folder_and_is_kept_only_if_unseen_pictures_come_out_much_better(
    green: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(QUICK, samples=16, rehearse=0, decoder_crops=160)
    out = finetune(green, tmp_path / "out", str(tiny_folder), options)
    facts, old, new = told(out), load(tiny_folder).tokenizer.state_dict(), load(out).tokenizer.state_dict()
    assert facts["decoder_psnr_after"] > facts["decoder_psnr_before"] + 1
    changed = {key.split(".")[0] for key in old if not torch.equal(old[key], new[key])}
    assert changed == {"decoder", "from_code"}, "what a token is stays as it was"
    scores = iter((1.0, 0.9, 0.8, 0.7))
    hardly = {"psnr": 1.0, "ssim": 0.1}
    monkeypatch.setattr("train.repaint.DecoderStage.measure", lambda *_: hardly | {"score": next(scores)})
    wild = finetune(green, tmp_path / "wild", str(tiny_folder), options)
    kept = load(wild).tokenizer.state_dict()
    assert all(torch.equal(old[key], kept[key]) for key in old)


# What it chooses


def plan_for(count: int, options: TuneOptions = QUICK, speeds: Speeds = USUAL, **more: Any) -> Plan:
    collection: Any = SimpleNamespace(
        train=list(range(count)), validation=list(range(count // 10)), flip_is_wise=True,
        art=SimpleNamespace(labels=["a"]),
    )  # fmt: skip
    return choose(options, collection, speeds, **({"labels": 33, "largest_rank": 44} | more))


def test_everything_is_chosen_from_the_count_and_the_machine() -> None:
    free = TuneOptions()
    plans = {count: plan_for(count, free) for count in (10, 50, 500)}
    assert [plan.method for plan in plans.values()] == ["lora", "lora", "lora"]
    assert [plan.batch for plan in plans.values()] == [8, 16, 16]
    assert plans[10].views == plans[50].views == 24 > plans[500].views >= 4
    ranks = [plan_for(count, free).rank for count in (10, 50, 500)]
    assert ranks == sorted(ranks) and len(set(ranks)) == 3
    assert plans[10].samples <= 120 * 10, "few pictures are not seen for ever"
    assert 8.5 * 60 < plans[50].seconds < 9.5 * 60 and plans[10].seconds < plans[50].seconds
    slow, fast = (plan_for(50, free, Speeds(10 * speed, 5 * speed)) for speed in (1, 3))
    assert slow.samples < fast.samples and slow.seconds < 9.5 * 60
    assert plan_for(50, replace(free, minutes=4)).samples < plans[50].samples


def test_every_choice_can_be_overridden() -> None:
    asked = TuneOptions(method="lora", rank=5, views=3, samples=64, batch=4, lr=1e-5, flip=False, decoder_crops=32)
    plan = plan_for(50, asked)
    expected = ("lora", 5, False, 3, 64, 4, 1e-5, 32)
    assert (plan.method, plan.rank, plan.flip, plan.views, plan.samples, plan.batch, plan.lr,
            plan.decoder_crops) == expected  # fmt: skip


def test_an_adapter_gets_no_higher_rank_than_fits_into_4_mb() -> None:
    assert plan_for(500, TuneOptions(adapter=True), largest_rank=20).rank == 20
    with pytest.raises(UserError, match="--rank 64 makes an adapter of more than 4 MB; 20 is the most"):
        plan_for(500, TuneOptions(adapter=True, rank=64), largest_rank=20)


def test_the_plan_and_an_estimate_are_said_before_it_starts(
    green: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(train.finetune, "encode", lambda *a, **k: said.append(capsys.readouterr().err) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune(green, tmp_path / "out", str(tiny_folder), TuneOptions())
    assert "validation" in said[0] and "crops of each picture" in said[0] and "in all, less if" in said[0]


# Being stopped


def interrupted(green: Path, out: Path, tiny_folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(green, out, str(tiny_folder), QUICK)


def test_ctrl_c_while_it_learns_leaves_the_best_so_far_and_the_same_command_ends_where_it_would_have(
    green: Path, tuned: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "greens"
    with monkeypatch.context() as patch:
        patch.setattr(TuneStage, "worries", lambda *_: os.kill(os.getpid(), signal.SIGINT) or [])
        interrupted(green, out, tiny_folder)
    half = igpt.load(out, "cpu")
    assert half.labels == ["red", "blue", "green"] and half.generate(size=16, label="green", seed=1)
    assert half.provenance["gpt"]["samples"] < 400
    finetune(green, out, str(tiny_folder), QUICK)
    assert load(out).weights_hash == load(tuned).weights_hash
    before = (out / "model.safetensors").stat().st_mtime_ns
    finetune(green, out, str(tiny_folder), QUICK)
    assert (out / "model.safetensors").stat().st_mtime_ns == before, "nothing is left to do"


@pytest.mark.parametrize("moment", ["measure_speeds", "encode", "look", "rehearsal", "run"])
@pytest.mark.parametrize("adapter", [False, True])
def test_ctrl_c_before_it_learns_leaves_a_model_that_draws(
    moment: str, adapter: bool, green: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.finetune, moment, pressed)
    options = replace(QUICK, adapter=adapter, method="lora" if adapter else "full")
    with pytest.raises(KeyboardInterrupt):
        finetune(green, tmp_path / "out", str(tiny_folder), options)
    out = tmp_path / "out"
    model = igpt.load(tiny_folder, "cpu", adapter=out / ADAPTER) if adapter else igpt.load(out, "cpu")
    assert model.labels == ["red", "blue", "green"] and model.generate(size=16, label="green", seed=1)


def test_encoding_that_is_stopped_keeps_what_it_has(
    green: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def pressed(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 14:
            os.kill(os.getpid(), signal.SIGINT)
        return view(*args)

    view = train.finetune.free_view
    monkeypatch.setattr(train.finetune, "free_view", pressed)
    interrupted(green, tmp_path / "out", tiny_folder)
    cache = TokenCache.load(tmp_path / "out" / WORK / "tokens.safetensors")[0]
    assert 1 <= len(cache) < 12 and len(cache.grids) == 4 * len(cache)


def test_a_full_disk_leaves_what_was_saved_before(
    green: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import igpt.checkpoint
    import train.state

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(TuneStage, "worries", lambda *_: os.kill(os.getpid(), signal.SIGINT) or [])
        interrupted(green, out, tiny_folder)
    files = [out / "model.safetensors", out / "config.json", out / WORK / "finetune-state.safetensors"]
    before = [path.read_bytes() for path in files]

    def full(tensors: Any, path: Path, *_: Any) -> None:
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    words = ["finetune", str(green), "--out", str(out), "--model", str(tiny_folder), "--quiet", "--samples", "400"]
    words += ["--views", "4", "--batch", "8", "--method", "full", "--seed", "1", "--decoder-crops", "0"]
    for module in (train.state, igpt.checkpoint):
        with monkeypatch.context() as patch:
            patch.setattr(module, "save_file", full)
            assert main(words) == 2
        error = capsys.readouterr().err
        assert "No space left on device" in error and error.count("\n") == 1
        assert [path.read_bytes() for path in files[:2]] == before[:2]
        if module is train.state:
            assert files[2].read_bytes() == before[2]
        assert not list(out.rglob("*.part"))
    assert main(words) == 0 and igpt.load(out, "cpu").provenance["gpt"]["samples"] == 400


# Memory


def stage_of(tiny_model: ImageGPT, pictures: int = 6) -> TuneStage:
    generator = torch.Generator().manual_seed(0)
    grids = [torch.randint(32, (16,), generator=generator).to(torch.uint16) for _ in range(2 * pictures)]
    cache = TokenCache(2, [0] * pictures, [(4, 4)] * len(grids), grids)
    torch.manual_seed(0)
    gpt = GPT(replace(tiny_model.gpt.config, dropout=0.0))
    gpt.load_state_dict(tiny_model.gpt.state_dict())
    plan = plan_for(pictures)
    everything = list(range(pictures))
    options = replace(QUICK, dropout=0.0)
    return TuneStage(cache, tiny_model.tokenizer, ["red", "blue"], everything, everything[:2], gpt, options, plan, None)


MEMORY = [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory")]


@pytest.mark.parametrize("error", MEMORY)
def test_memory_that_runs_out_halves_the_batch_and_the_result_stays_the_same(
    error: Exception, tiny_model: ImageGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    schedule = Schedule(6, 8, 999, 9, 0, "no", quiet=True)
    for name in ("whole", "halved"):
        (tmp_path / name).mkdir()
    whole = run(stage_of(tiny_model), schedule, tmp_path / "whole", {})
    sizes: list[int] = []
    loss = TuneStage.loss

    def small(self: TuneStage, turn: str, ready: Any, batch: Any, *more: Any) -> Any:
        sizes.append(len(batch["label"]))
        if sizes[-1] > 2:
            raise error
        return loss(self, turn, ready, batch, *more)

    monkeypatch.setattr(TuneStage, "loss", small)
    halved = run(stage_of(tiny_model), schedule, tmp_path / "halved", {})
    assert sizes[:3] == [8, 4, 2] and set(sizes[3:]) == {2}
    assert "going on with 2 samples at once" in capsys.readouterr().err
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "halved")]
    first, second = (json.loads(lines[0]) for lines in logs)
    for number in ("nats", "model_gradient"):
        assert first[number] == pytest.approx(second[number], rel=1e-3)
    start = torch.cat([p.detach().flatten() for p in tiny_model.gpt.parameters()])
    one, other = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (whole, halved))
    # Sums in another order differ in their last bits, of which orthogonal steps in bfloat16 make more.
    assert (one - other).norm() <= 0.05 * (one - start).norm()


def test_memory_too_small_for_one_sample_is_said_plainly(
    tiny_model: ImageGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TuneStage, "loss", never)
    with pytest.raises(UserError, match="too little memory for 1 samples at once"):
        run(stage_of(tiny_model), Schedule(2, 4, 999, 9, 0, "no", quiet=True), tmp_path, {})


# Copies


def test_learning_by_heart_is_said_in_plain_words_while_it_happens(tiny_model: ImageGPT) -> None:
    stage = stage_of(tiny_model)
    lead = stage._before["bits_validation"] - stage._before["bits_training"]
    assert stage.worries(0.5, {"bits_validation": 9.0 + lead, "bits_training": 9.0}) == []
    (sentence,) = stage.worries(0.5, {"bits_validation": 9.0 + lead + BY_HEART + 0.1, "bits_training": 9.0})
    assert "by heart" in sentence and "--samples" in sentence


def test_drawn_pictures_that_are_training_pictures_are_counted_as_copies(
    green: Path, tiny_model: ImageGPT, tmp_path: Path
) -> None:
    from tokenizer_vq.images import fit_cover

    collection = gather(green)
    art, kept = collection.art, collection.validation
    copied = [fit_cover(art.picture(i), 32, 32) for i in collection.train[:3]]
    own = [paint(900 + i, colour, (32, 32)) for i, colour in enumerate(COLOURS.values())]
    assert copies(tiny_model, copied + own, art, collection.train, kept, "test") == 3


def test_a_model_that_repeats_its_pictures_is_warned_of(
    green: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train.finetune, "copies", lambda *_: 5)
    finetune(green, tmp_path / "out", str(tiny_folder), replace(QUICK, samples=16, quiet=False, rehearse=0))
    assert "warning: it repeats its training pictures" in capsys.readouterr().err


# Mistakes


def test_mistakes_are_answered_in_one_sentence_and_leave_nothing_behind(
    green: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(green, "art")
    shutil.copytree(tiny_folder, "tiny")
    Path("empty").mkdir()
    Path("one").mkdir()
    shutil.copy("art/0.png", "one")
    Path("same").mkdir()
    Path("unreadable").mkdir()
    for i in range(4):
        shutil.copy("art/0.png", f"same/{i}.png")
        Path(f"unreadable/{i}.png").write_text("no picture")
    Path("thesis").mkdir()
    Path("thesis/thesis.txt").write_text("precious")
    palette = PaletteTokenizer(PaletteConfig(("#000000", "#ffffff")))
    ImageGPT(palette, GPT(GPTConfig(2, 0, layers=2, width=32, heads=2, cells=16))).save("pixels")
    cases = [
        ("missing", "'missing'"), ("empty", "no usable picture in empty"), ("one", "1 usable different picture"),
        ("same", "all 4 show the same"), ("unreadable", "0.png is no picture"), ("tiny", "is a model"),
        ("art --out thesis", "something else"), ("art --out tiny", "already holds a finished model"),
        ("art --out art/0.png", "art/0.png"), ("art --model pixels", "pixel tokenizer"),
        ("art --model nothing", "'nothing'"), ("art --minutes 0", "--minutes 0"), ("art --rank 0", "--rank 0"),
        ("art --samples 0", "--samples 0"), ("art --lr 2", "--lr 2"), ("art --method best", "'best'"),
        ("art --adapter --method full", "--adapter"), ("art --rehearse 1", "--rehearse 1"),
        ("art --manifest x.csv", "--remember"), ("art --patience 0", "--patience"),
        ("art --adapter --decoder-crops 9", "no decoder"), ("art --method full --rank 3", "--rank"),
    ]  # fmt: skip
    for line, said in cases:
        before = sorted(str(path) for path in Path().rglob("*"))
        words = line.split()
        more = ["--model", "tiny"] if "--model" not in words else []
        assert main(["finetune", *words, *([] if "--out" in words else ["--out", "new"]), *more]) == 2, line
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("igpt: ") and err.count("\n") == 1 and said in err, (line, err)
        assert sorted(str(path) for path in Path().rglob("*")) == before, line


def test_a_folder_begun_with_other_pictures_or_options_is_not_gone_on_with(
    green: Path, tuned: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="begun with samples 400, now it is 80"):
        finetune(green, tuned, str(tiny_folder), replace(QUICK, samples=80))
    fewer = tmp_path / "green"
    shutil.copytree(green, fewer)
    (fewer / "0.png").unlink()
    with pytest.raises(UserError, match="other pictures"):
        finetune(fewer, tuned, str(tiny_folder), QUICK)


# The real thing


@pytest.mark.slow
def test_twelve_painted_pictures_teach_the_model_in_the_box(tmp_path: Path) -> None:
    art = tmp_path / "discs"
    art.mkdir()
    for i in range(12):
        paint(i, (40, 180, 60), (256, 256)).save(art / f"{i}.png")
    words = ["finetune", str(art), "--out", str(tmp_path / "out"), "--samples", "240", "--views", "6"]
    words += ["--decoder-crops", "64"]
    command = [sys.executable, "-m", "igpt", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = told(tmp_path / "out")
    assert facts["bits"] < 0.85 * facts["base_bits"], facts
    assert facts["peak_memory_gb"] < 3
    model = igpt.load(tmp_path / "out", "cpu")
    assert model.labels[-1] == "discs" and model.generate(size=64, label="discs", seed=1)[0].size == (64, 64)
