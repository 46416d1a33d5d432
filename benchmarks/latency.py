"""How long a student takes for a picture, its first question and further ones, at the true size of the 0.5B.

Random weights in the true configuration, a depth picture of 730 x 530 pixels (a Kinect v2 frame of SUN RGB-D) in the
default image tokens (anyres), questions of 20 tokens and answers of four: what evaluation/answer.py does without
--others. Each setting is measured in a process of its own.

    python benchmarks/latency.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import available_cores, peak_memory, run_script, use_cores  # first: loads .env

# isort: split
import argparse
import json
import statistics
import subprocess
import time

import numpy as np
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from dataset.inputs.depth_encodings import encode_depth
from dataset.inputs.own_pictures import own_camera
from dataset.inputs.processor import ImageTextProcessor
from distillation.decoding import answers_behind, read_prefix
from distillation.forward import use_packed_attention
from distillation.shapes import true_config, true_processor

HEIGHT, WIDTH = 530, 730
QUESTION_TOKENS, ANSWER_TOKENS, CHAT_TOKENS = 20, 4, 14
FURTHER_QUESTIONS = 7
DTYPES = ("float32", "bfloat16")


def parse_args(argv=None) -> argparse.Namespace:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=DTYPES, help="measure with these numbers on all cores, print JSON")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure one setting, or all of them in processes of their own and print a table."""
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    print("| cores | numbers | picture, s | first question, s | further ones, s | further : first | peak, GiB |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    cores = available_cores()
    for n in sorted({1, min(2, len(cores))}):
        use_cores(cores[:n])  # the processes that start now inherit it, and PyTorch takes as many threads
        for dtype in DTYPES:
            command = [sys.executable, __file__, "--measure", dtype]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            first = result["picture"] + result["first"]
            print(
                f"| {n} | {dtype} | {result['picture']:.2f} | {result['first']:.2f} | {result['further']:.2f} | "
                f"1 : {first / result['further']:.0f} | {result['peak_gib']:.1f} |",
                flush=True,
            )


def measure(dtype: str) -> dict[str, float]:
    """Seconds for the picture, the first question about it and the median further one; peak memory in GiB."""
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    model = use_packed_attention(LlavaOnevisionForConditionalGeneration(true_config("0.5b"))).eval()
    torch.set_default_dtype(torch.float32)
    processor = true_processor()
    depth_m = np.random.default_rng(0).uniform(0.5, 6.0, (HEIGHT, WIDTH)).astype(np.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        start = time.monotonic()
        prefix = look(model, processor, depth_m)
        picture_s = time.monotonic() - start
        first_s, *further_s = (ask(model, prefix, number) for number in range(1 + FURTHER_QUESTIONS))
    return {
        "picture": picture_s,
        "first": first_s,
        "further": statistics.median(further_s),
        "peak_gib": peak_memory() / 2**30,
    }


def look(model: LlavaOnevisionForConditionalGeneration, processor: ImageTextProcessor, depth_m: np.ndarray):
    """Encode a picture, cut it into tiles, read it."""
    camera = own_camera(WIDTH, HEIGHT)
    image = encode_depth(depth_m, encoding="metric_log3", intrinsics=camera.intrinsics, tilt=camera.tilt)
    pixels = processor.pixels([image], image_tokens="anyres")
    n_image_tokens = processor.count_image_tokens(HEIGHT, WIDTH, image_tokens="anyres")
    ids = torch.tensor([[*range(CHAT_TOKENS), *[model.config.image_token_id] * n_image_tokens]])
    return read_prefix(model, ids, pixels)


def ask(model: LlavaOnevisionForConditionalGeneration, prefix, number: int) -> float:
    """Seconds for one question with an answer of `ANSWER_TOKENS`."""
    start = time.monotonic()
    question = list(range(1000 * number, 1000 * number + QUESTION_TOKENS))
    options = {"vocab_size": model.config.text_config.vocab_size, "eos_token_id": -1}
    answers = answers_behind(model, prefix, [question], max_new_tokens=ANSWER_TOKENS, **options)
    assert len(answers.tokens[0][0]) == ANSWER_TOKENS
    return time.monotonic() - start


if __name__ == "__main__":
    run_script(main, parse_args)
