"""Caption scores of answers: BLEU-1..4, ROUGE-L and CIDEr by pycocoevalcap, on request METEOR.

Most answers have one word, so BLEU-2..4 are close to 0 by construction and accuracy per question type is the headline.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METEOR_TIMEOUT_S = 600
# Applied in order to lower-cased text whose white space is collapsed: what the Penn Treebank tokenizer of the COCO
# evaluation does to English, without its Java.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r'(^|(?<=[\s([{<]))"', r" `` "),  # opening quote
        (r"[,:](?!\d)", r" \g<0> "),  # not inside 3,5 or 10:30
        (r"\.\.\.|--|[?!]+|[;@#$%&]", r" \g<0> "),
        (r"(?<=[a-z0-9'])(?<!\betc)(?<!\.[a-z])\.(?=\s)", r" ."),
        (r"(?<!\.)\.(?=[\])}>\"'\s]*$)", r" . "),
        (r"''|\"", r" '' "),
        (r"<\w+>|[\[\](){}<>]", r" \g<0> "),  # <unk> and its like stay whole
        (r"(?<=\w)('ll|'re|'ve|n't|'s|'m|'d|')(?=\s|$)", r" \1"),
        (r"\bcannot\b", "can not"),
        (r"\bgonna\b", "gon na"),
    )
]
# The COCO evaluation drops brackets in upper case only, so the lower-cased ones stay, as they do in published scores.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}
_DROPPED = frozenset("'' ' `` ` . ? ! , : - -- ... ;".split())


def tokenize(text: str) -> str:
    """Lower-cased Treebank tokens of `text`, joined by single spaces and without punctuation.

    White space of any kind counts as a space, so that a caption can never spill over into the next line.

    Source: the tokenization of the COCO caption evaluation, https://arxiv.org/abs/1504.00325, section 3.
    """
    text = " ".join(text.split()).lower()
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return " ".join(_BRACKETS.get(token, token) for token in text.split() if token not in _DROPPED)


def caption_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    images: Sequence[str],
    *,
    meteor: bool = False,
    spice: bool = False,
) -> dict[str, Any]:
    """Corpus scores of captions or answers, one reference each.

    Args:
        predictions: (N,) generated texts; an empty one is allowed and scores 0.
        references: (N,) reference texts.
        images: (N,) the image of each row. CIDEr weighs n-grams by how few images have them.
        meteor: also compute METEOR, which needs Java and several seconds.
        spice: also report SPICE, which is never computed; the note says why.

    Returns:
        `n`, `n_images`, `bleu_1`..`bleu_4`, `rouge_l`, `cider`, and `meteor`, `spice` where asked for. A score that
        cannot be computed is None, never 0. `notes` says why, or how far a score can be trusted, by its name.

    Raises:
        ValueError: the three lists differ in length, or are empty.
    """
    if not predictions or not len(predictions) == len(references) == len(images):
        raise ValueError(f"{len(predictions)} predictions, {len(references)} references, {len(images)} images")
    generated = {row: [tokenize(text)] for row, text in enumerate(predictions)}
    expected = {row: [tokenize(text)] for row, text in enumerate(references)}

    scores: dict[str, Any] = {"n": len(predictions), "n_images": len(set(images))}
    notes: dict[str, str] = {}
    scores |= _bleu_and_rouge(expected, generated)
    scores["cider"] = _cider(expected, generated, scores["n_images"], notes)
    if meteor:
        scores["meteor"] = _meteor(expected, generated, notes)
    if spice:
        scores["spice"] = None
        notes["spice"] = (
            "not computed: its wrapper downloads Stanford CoreNLP without encryption into the Python installation, "
            "and answers of one or two words have no scene graph to compare"
        )
    return scores | {"notes": notes}


Captions = dict[int, list[str]]


def _bleu_and_rouge(expected: Captions, generated: Captions) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, _ = Bleu(4).compute_score(expected, generated, verbose=0)
    rouge_l, _ = Rouge().compute_score(expected, generated)
    return {f"bleu_{n}": float(score) for n, score in enumerate(bleu, 1)} | {"rouge_l": float(rouge_l)}


def _cider(expected: Captions, generated: Captions, n_images: int, notes: dict[str, str]) -> float | None:
    if n_images < 2:
        notes["cider"] = "not computed: it compares images, and there is only one"
        return None
    if n_images < 100:
        notes["cider"] = f"unstable: word weights come from only {n_images} images; take at least 100"
    from pycocoevalcap.cider.cider import Cider

    score, _ = Cider().compute_score(expected, generated)
    return float(score)


def _meteor(expected: Captions, generated: Captions, notes: dict[str, str]) -> float | None:
    """METEOR 1.5 over two files in one run of Java, instead of a dialogue over pipes that can hang."""
    java = shutil.which("java")
    if java is None:
        notes["meteor"] = "not computed: no `java` on this machine"
        return None
    from pycocoevalcap.meteor import meteor

    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, captions in (("generated", generated), ("expected", expected)):
            files.append(Path(folder, name))
            files[-1].write_text("".join(f"{caption}\n" for (caption,) in captions.values()), encoding="utf-8")
        jar = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
        command = [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", jar, *files, "-l", "en", "-norm", "-q"]
        try:
            output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=METEOR_TIMEOUT_S)
            segments = output.stderr.split()
            if len(segments) != len(generated):
                raise ValueError(f"{len(generated)} captions in, {len(segments)} scores out")
            return float(output.stdout)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            notes["meteor"] = f"not computed: METEOR failed ({error})"
            return None
