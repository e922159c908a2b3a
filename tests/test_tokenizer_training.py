"""How a tokenizer is trained: fitted to its collection, watched, its decoder tuned at the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from igpt.checkpoint import load
from tests.painting import art_folder, paint
from tests.test_training import QUIET, SHORT, SIMPLE, TOY, gpt_task, run_of, schedule, vq
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.vq import VQConfig, VQTokenizer
from train.decoder import DecoderTask, corrupt_tokens
from train.folder import Run
from train.loop import run
from train.options import TrainOptions
from train.run import train
from train.tokenizer import TokenizerTask


@pytest.fixture(scope="module")
def art(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return art_folder(tmp_path_factory.mktemp("art"))


# Fitted to the collection


@pytest.mark.parametrize(
    ("pictures", "side", "downsample", "cells", "codes", "crop", "crops"),
    [
        (5000, 256, 8, 256, 4096, 128, 50_000),  # paintings: the preset as it is
        (5000, 1500, 8, 256, 4096, 128, 50_000),
        (20, 256, 8, 256, 64, 128, 4_000),  # few pictures: few codes, fewer crops
        (300, 256, 8, 256, 1024, 128, 30_000),
        (2000, 72, 4, 81, 2048, 72, 50_000),  # emoji: smaller tokens
        (2000, 32, 4, 16, 256, 32, 50_000),  # tiles: crops no larger than they are
        (2000, 16, 4, 4, 64, 32, 50_000),
    ],
)
def test_the_settings_follow_from_number_and_size_of_the_pictures(
    pictures: int, side: int, downsample: int, cells: int, codes: int, crop: int, crops: int
) -> None:
    preset = TrainOptions().suited(pictures, side)
    chosen = (preset.downsample, preset.cells, preset.codes, preset.crop, preset.tokenizer_crops)
    assert chosen == (downsample, cells, codes, crop, crops) and preset.cell == 2


def test_large_tokens_are_few_enough_to_be_drawn_one_by_one() -> None:
    large, usual = (TrainOptions(downsample=pixels).suited(5000, 256) for pixels in (16, 8))
    assert (large.cell, large.cells) == (1, 256) and (usual.cell, usual.cells) == (2, 256)
    taken = TrainOptions().suited(5000, 256, downsample=16)
    assert (taken.downsample, taken.cell) == (16, 1), "those of a tokenizer that is there already"


@pytest.mark.parametrize(("downsample", "channels"), [(4, (160,)), (8, VQConfig().channels), (16, (160, 256, 256))])
def test_the_tokenizer_has_a_level_for_every_halving(downsample: int, channels: tuple[int, ...]) -> None:
    assert TrainOptions(downsample=downsample).suited(5000, 256).channels == channels
    few = tuple(32 for _ in channels)  # as many levels, quickly made
    assert VQTokenizer(VQConfig(channels=few)).downsample == downsample


def test_pictures_as_small_as_they_may_be_go_the_whole_way(tmp_path: Path) -> None:
    for i in range(6):
        paint(i, (200, 40, 40), (16, 16)).save(tmp_path / f"{i}.png")
    found = load(train(tmp_path, tmp_path.parent / "model", replace(SHORT, adversarial=0.5)))
    assert (found.tokenizer.downsample, found.gpt.config.cells) == (4, 4)


def test_a_flag_is_stronger_than_what_would_be_chosen() -> None:
    preset = TrainOptions(codes=512, downsample=16, tokenizer_crops=77, decoder_crops=0).suited(20, 256)
    assert (preset.codes, preset.downsample, preset.tokenizer_crops, preset.decoder_crops) == (512, 16, 77, 0)


@pytest.mark.parametrize(("flag", "value"), [("codes", 1), ("codes", 65537), ("downsample", 5), ("decoder_crops", -1)])
def test_flags_that_cannot_be_meant_are_refused(flag: str, value: int) -> None:
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} {value}"):
        TrainOptions(**{flag: value}).suited(20, 256)  # type: ignore[arg-type]


def test_pictures_smaller_than_the_crop_are_learned_from_all_the_same(tmp_path: Path) -> None:
    for i in range(4):
        paint(i, (200, 40, 40), (20, 33)).save(tmp_path / f"{i}.png")
    task = TokenizerTask(Run(ArtFolder(tmp_path), [0, 1, 2], [3], QUIET, tmp_path, replace(TOY, crop=64)), SIMPLE)
    assert task.dataset[0].shape == (3, 64, 64)


@pytest.mark.parametrize("pictures", ["one", "equal"])
def test_a_collection_with_nothing_to_tell_apart_is_refused(pictures: str, tmp_path: Path) -> None:
    for i in range(1 if pictures == "one" else 4):
        Image.new("RGB", (64, 64), "teal").save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match="different"):
        train(tmp_path, tmp_path / "model", QUIET)
    assert not (tmp_path / "model").exists()


def test_a_folder_that_changes_between_two_runs_is_noticed(tmp_path: Path) -> None:
    train(art_folder(tmp_path / "art"), tmp_path / "model", SHORT)
    paint(99, (0, 200, 0)).save(tmp_path / "art" / "red" / "new.png")
    with pytest.raises(UserError, match="other pictures"):
        train(tmp_path / "art", tmp_path / "model", SHORT)


# Warnings


def test_a_collapsing_codebook_is_reported_in_plain_words(art: Path) -> None:
    task = TokenizerTask(run_of(art), SIMPLE)
    task.used_K[:20] = True
    assert task.warnings(0.5, {}) == [] and not task.used_K.any()  # 20 of 32 are enough, and are counted anew
    assert task.warnings(0.0, {}) == []  # it has not begun to be used
    task.used_K[:8] = True
    (sentence,) = task.warnings(0.5, {})
    assert "collapsing" in sentence and "25% of its 32 codes" in sentence


def test_a_winning_discriminator_is_reported_in_plain_words(art: Path) -> None:
    task = DecoderTask(run_of(art, replace(QUIET, adversarial=0.5)), SIMPLE, vq())
    assert task.warnings(0.5, {"d_loss": 0.6}) == [] == task.warnings(0.01, {"d_loss": 0.0})
    (sentence,) = task.warnings(0.5, {"d_loss": 0.02})
    assert "discriminator wins" in sentence and "0.020" in sentence


def test_warnings_reach_the_screen_and_not_a_quiet_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        task = gpt_task()
        task.warnings = lambda progress, metrics: ["mind the codes"]  # type: ignore[method-assign]
        run(task, schedule(1, replace(QUIET, quiet=quiet)), tmp_path / str(quiet))
        assert ("warning: mind the codes" in capsys.readouterr().err) is not quiet


# Frozen codes


@pytest.mark.parametrize("adversarial", [0.0, 0.5])
def test_the_last_stage_changes_the_decoder_and_nothing_that_makes_tokens(
    adversarial: float, art: Path, tmp_path: Path
) -> None:
    tokenizer = vq()
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    task = DecoderTask(run_of(art, replace(QUIET, adversarial=adversarial)), SIMPLE, tokenizer)
    after = run(task, schedule(6), tmp_path).state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"from_code", "decoder"}


def test_no_weights_are_kept_from_before_the_discriminator_has_its_full_say(art: Path, tmp_path: Path) -> None:
    task = DecoderTask(run_of(art, replace(QUIET, adversarial=0.5)), SIMPLE, vq())
    for progress, scored in ((0.0, False), (0.2, False), (0.5, True)):
        assert ("score" in task.measure(vq(), progress)) is scored
    images, generator = torch.zeros(2, 3, 32, 32), torch.Generator().manual_seed(0)
    for progress, counts in ((0.0, False), (0.2, True)):
        _, metrics = task.loss(images, progress, generator)
        assert ("g_loss" in metrics) is counts and "d_loss" in metrics  # it learns before it counts


def test_corrupted_tokens_are_as_many_as_asked_for_and_from_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens_Bhw = torch.randint(1000, 1500, (16, 16, 16), generator=generator)
    corrupted = corrupt_tokens(tokens_Bhw, 0.05, generator)
    assert 0.035 < float((corrupted != tokens_Bhw).float().mean()) < 0.065
    assert set(corrupted.unique().tolist()) <= set(tokens_Bhw.unique().tolist())
    assert torch.equal(corrupt_tokens(tokens_Bhw, 0.0, generator), tokens_Bhw)
