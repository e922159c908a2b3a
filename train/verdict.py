"""What came of a fine-tuning, in plain words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

COPIED = 0.1  # share of copies among drawn pictures at which a person is warned


def sentences(facts: dict[str, Any], validation: int, sheet: Path) -> list[str]:
    """The numbers that `igpt finetune` measured, each beside its yardstick, and warnings."""
    gain = 1 - facts["bits"] / facts["base_bits"]
    verdict = f"{abs(gain):.1%} {'better' if gain > 0 else 'worse'}"
    told = [
        f"a token of the {validation} pictures kept for validation costs {facts['bits']:.2f} bits; the base at its "
        f"best ({facts['base_label']}) needs {facts['base_bits']:.2f}: {verdict}"
    ]
    if "decoder_psnr_after" in facts:
        told.append(
            f"through the codes and back they have {facts['decoder_psnr_before']:.1f} dB with the old decoder and "
            f"{facts['decoder_psnr_after']:.1f} dB with one that learned (SSIM {facts['decoder_ssim_before']:.2f} and "
            f"{facts['decoder_ssim_after']:.2f}): the decoder that learned them is "
            + ("kept" if facts["decoder_kept"] else "not kept, that is too little")
        )
    if "forgetting_after" in facts:
        told.append(
            f"the art of the base: {facts['forgetting_before']:.2f} bits a token before and "
            f"{facts['forgetting_after']:.2f} now; through the codes and back {facts['forgetting_psnr_before']:.1f} dB "
            f"before and {facts['forgetting_psnr_after']:.1f} dB now"
        )
    told.append(
        f"{facts['copied']} of {facts['drawn']} drawn pictures come nearer to a training picture than any picture kept "
        "for validation does"
    )
    if facts["copied"] > COPIED * facts["drawn"]:
        told.append(
            "warning: it repeats its training pictures; look at what it draws with `igpt audit`; fewer --samples or "
            "more pictures help"
        )
    memory = f", {facts['peak_memory_gb']} GB of memory at most" if facts["peak_memory_gb"] else ""
    told.append(f"{facts['minutes']} minutes{memory}; before and after are side by side in {sheet}")
    return told


def peak_memory() -> float | None:
    """Of this process so far, in GB; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)
