"""The arms of the study: which variants there are, of which calls of training scripts, and what is compared."""

from dataclasses import dataclass, replace

from dataset.inputs.degradations import DEPTH_LADDER, TRAINED

EPOCHS = 5  # of 5,000 images in batches of 8: 3,125 optimizer steps, for every variant
FRACTIONS = (1.0, 0.1, 0.05)
TROUBLE = "knowledge_distillation7b_double_trouble"
# Run name -> flags with which baseline_rgb7b tunes this teacher. With few labels the stock teacher teaches instead,
# because it has read none of them.
TEACHERS = {
    "teacher": (),
    # Wrong so often that LoCa has something to correct: .58 on val, and LoCa corrects 25 % of the gold tokens (9 % of
    # the stock teacher's).
    "weak_teacher": ("--subset_percentage", "0.05", "--batch_size", "8", "--max_epochs", "1", "--lr", "1e-2"),
    "teacher_in_4_bits": ("--base_bits", "4"),
}
ASK = ("--teacher_questions", "8")
CONTROL = "label-only"


@dataclass(frozen=True)
class Stage:
    """One call of a training script in a variant.

    Attributes:
        system: whose learning rates in `RATES` it gets.
        script: folder below distillation/.
        epochs: passes over the training images.
        flags: further flags of the script.
        labels: whether it reads gold answers; one that reads none is trained once for all shares of labels.
        teacher: a run of `TEACHERS`; None = no teacher.
        rates: flags of the script's learning rates.
    """

    system: str
    script: str
    epochs: int
    flags: tuple[str, ...] = ()
    labels: bool = True
    teacher: str | None = "teacher"
    rates: tuple[str, ...] = ("lr", "vision_lr")

    def but(self, *flags: str) -> "Stage":
        """The same stage with further flags."""
        return replace(self, flags=self.flags + flags)


LABELS_ONLY = Stage(CONTROL, "baseline_depth", EPOCHS, teacher=None)
RGB_STUDENT = Stage("RGB student", "baseline_rgb05b", EPOCHS, teacher=None)
LOGITS = Stage("logit-based", "knowledge_distillation7b_logit_based", EPOCHS)
FEATURES = Stage("feature-based", "knowledge_distillation7b_feature_based", EPOCHS, rates=("lr", "vision_lr", "map_lr"))
JOINT = Stage("joint", f"{TROUBLE}/phase3", EPOCHS, ("--from_stock",))
THREE_PHASES = (
    Stage("phase 1", f"{TROUBLE}/phase1", 2, labels=False, rates=("vision_lr",)),
    Stage("phase 2", f"{TROUBLE}/phase2", 1, rates=("lr",)),
    Stage("phase 3", f"{TROUBLE}/phase3", 2),
)
ASKING_PHASES = tuple(stage.but(*ASK) if stage.labels else stage for stage in THREE_PHASES)
DEGRADATION = ("--depth_degradation", "0.35")


def degraded(*stages: Stage) -> tuple[Stage, ...]:
    """The same stages on depth that is degraded at random, but for phase 1, where that costs clean accuracy.

    The figures are in distillation/README.md, "What was tried and dropped".
    """
    return tuple(stage if stage.system == "phase 1" else stage.but(*DEGRADATION) for stage in stages)


VARIANTS = {  # name -> stages; all others are measured against the first one
    CONTROL: (LABELS_ONLY,),
    "double trouble": ASKING_PHASES,
}
OFF = {  # term of the joint training -> flags that turn it off
    "LoCa": ("--kl_weight", "0"),
    "InfoNCE": ("--contrastive_weight", "0"),
    "patches": ("--patch_weight", "0"),
}


def joint_without(*terms: str) -> Stage:
    """The joint training on gold questions without some of its loss terms, at the same learning rates."""
    return JOINT.but(*(flag for term in terms for flag in OFF[term]))


KL, LOCA = replace(LOGITS, system="joint"), joint_without("InfoNCE", "patches")  # at the same learning rates
# Trained with all labels and all seeds, and scored on the ladder of robustness.py, as VARIANTS with all labels are.
DEGRADED_VARIANTS = {
    f"{CONTROL}, degraded depth": degraded(LABELS_ONLY),
    "double trouble, degraded depth": degraded(*ASKING_PHASES),
}
ON_LADDER = (*VARIANTS, *DEGRADED_VARIANTS)
# Trained twice as long, with all labels and few seeds.
LONG_VARIANTS = {
    f"{name}, twice as long": tuple(replace(stage, epochs=2 * stage.epochs) for stage in stages)
    for name, stages in (VARIANTS | DEGRADED_VARIANTS | {"RGB student": (RGB_STUDENT,)}).items()
}
LONG_ON_LADDER = tuple(f"{name}, twice as long" for name in ON_LADDER)
# Trained with all labels and few seeds: CE with one further term each, all terms but one each, the phases, other
# strategies.
FULL_LABEL_VARIANTS = {
    "CE": (joint_without(*OFF),),
    "CE + KL": (KL,),
    "CE + LoCa": (LOCA,),
    "CE + InfoNCE": (joint_without("LoCa", "patches"),),
    "CE + patches": (joint_without("LoCa", "InfoNCE"),),
    "CE + LoCa + teacher questions": (LOCA.but(*ASK),),
    "CE + InfoNCE + patches": (joint_without("LoCa"),),
    "CE + LoCa + patches": (joint_without("InfoNCE"),),
    "CE + LoCa + InfoNCE": (joint_without("patches"),),
    "CE + LoCa + InfoNCE + patches": (JOINT,),
    "joint": (JOINT.but(*ASK),),
    "double trouble, gold questions only": THREE_PHASES,
    "logit-based": (LOGITS.but(*ASK),),
    "feature-based": (FEATURES.but(*ASK),),
    "feature-based, gold questions only": (FEATURES,),
    "feature-based without patches": (FEATURES.but(*OFF["patches"]),),
    "feature-based without hidden states": (FEATURES.but("--hidden_weight", "0"),),
    "CE + KL, weak teacher": (replace(KL, teacher="weak_teacher"),),
    "CE + LoCa, weak teacher": (replace(LOCA, teacher="weak_teacher"),),
    "RGB student": (RGB_STUDENT,),
}
# With all labels and one seed, where bitsandbytes is installed.
FOUR_BITS_VARIANTS = {
    "double trouble, teacher in 4 bits": tuple(replace(stage, teacher="teacher_in_4_bits") for stage in ASKING_PHASES),
}
COMPARISONS = (  # what is compared, the variant with it, the variant without it
    ("LoCa, on CE alone", "CE + LoCa", "CE"),
    ("LoCa, beside all else", "CE + LoCa + InfoNCE + patches", "CE + InfoNCE + patches"),
    ("InfoNCE, on CE alone", "CE + InfoNCE", "CE"),
    ("InfoNCE, beside all else", "CE + LoCa + InfoNCE + patches", "CE + LoCa + patches"),
    ("patches, on CE alone", "CE + patches", "CE"),
    ("patches, beside all else", "CE + LoCa + InfoNCE + patches", "CE + LoCa + InfoNCE"),
    ("teacher questions, on CE + LoCa", "CE + LoCa + teacher questions", "CE + LoCa"),
    ("teacher questions, beside all else", "joint", "CE + LoCa + InfoNCE + patches"),
    ("hidden states, beside patches", "feature-based, gold questions only", "feature-based without hidden states"),
    ("patches, beside hidden states", "feature-based, gold questions only", "feature-based without patches"),
    ("teacher questions, in feature-based", "feature-based", "feature-based, gold questions only"),
    ("KL, on CE alone", "CE + KL", "CE"),
    ("LoCa instead of KL", "CE + LoCa", "CE + KL"),
    ("LoCa instead of KL, weak teacher", "CE + LoCa, weak teacher", "CE + KL, weak teacher"),
    ("phases instead of all at once", "double trouble", "joint"),
    (
        "phases instead of all at once, gold questions only",
        "double trouble, gold questions only",
        "CE + LoCa + InfoNCE + patches",
    ),
    ("RGB instead of depth, labels only", "RGB student", CONTROL),
    ("depth and a teacher instead of RGB", "double trouble", "RGB student"),
    (
        "depth and a teacher instead of RGB, both twice as long",
        "double trouble, twice as long",
        "RGB student, twice as long",
    ),
    ("degraded depth, labels only", f"{CONTROL}, degraded depth", CONTROL),
    ("degraded depth, in double trouble", "double trouble, degraded depth", "double trouble"),
    (
        "degraded depth, in double trouble twice as long",
        "double trouble, degraded depth, twice as long",
        "double trouble, twice as long",
    ),
    ("distillation, both twice as long", "double trouble, twice as long", f"{CONTROL}, twice as long"),
    ("twice as long, labels only", f"{CONTROL}, twice as long", CONTROL),
    ("twice as long, in double trouble", "double trouble, twice as long", "double trouble"),
    ("teacher in 4 bits instead of 16", "double trouble, teacher in 4 bits", "double trouble"),
)
ALL_VARIANTS = VARIANTS | DEGRADED_VARIANTS | FULL_LABEL_VARIANTS | LONG_VARIANTS | FOUR_BITS_VARIANTS
FEW_SEEDS = 3  # of runs with few labels, of FULL_LABEL_VARIANTS and LONG_VARIANTS


def ladder_kinds(variant: str, fraction: float) -> list[str] | None:
    """The kinds of worse depth or less light that runs of this variant are scored with; None = they are not.

    All kinds for the variants of all seeds, those that are trained for otherwise.
    """
    if fraction < 1:
        return None
    if variant in ON_LADDER:
        return list(DEPTH_LADDER)
    if variant == "RGB student":
        return ["light_gain"]
    return [*TRAINED, "no_depth"] if variant in LONG_ON_LADDER else None
