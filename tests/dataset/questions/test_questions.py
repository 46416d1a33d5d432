"""Questions: answers against naive geometry, ambiguity, colors, balance, and the files."""

import csv
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest

from dataset.questions.balance import ANSWER_SHARE, TYPE_EXCESS, select_questions, select_unlabelled
from dataset.questions.blind import blind_check
from dataset.questions.generate import color_name, direction, frame_candidates
from dataset.questions.rows import (
    COLUMNS,
    CONTROL_TOKENS,
    QUESTION_TYPES,
    REQUIRED_COLUMNS,
    Question,
    csv_cells,
    read_questions,
    write_questions,
)
from dataset.sunrgbd.annotations import Instance
from utils import UserError

NOUNS = ("bed", "sofa", "chair", "table", "cabinet", "lamp", "bin", "ball")
SIZE = 64


def thing(noun, center=(0.0, 0.0, 2.0), box=(0, 0, 20, 20), depth=None, size=None):
    mask = np.zeros((SIZE, SIZE), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    depth = center[2] if depth is None else depth
    return Instance(noun, mask, depth, np.array(center, float), None if size is None else np.array(size, float))


def ask(instances, *, rgb=None, seed=0, **options):
    return frame_candidates(instances, rgb=rgb, rng=np.random.default_rng(seed), **{"vocabulary": NOUNS, **options})


def answers(instances, **options):
    return {question.text: question.answer for question in ask(instances, **options)}


def random_room(rng):
    nouns = rng.choice(NOUNS, rng.integers(2, 7))
    things = []
    for noun in nouns:
        x, y = rng.integers(0, 40, 2)
        w, h = rng.integers(3, 24, 2)
        center = rng.uniform((-2, -1, 1), (2, 1, 5))
        things.append(thing(str(noun), center, (x, y, x + w, y + h), size=rng.uniform(0.2, 1.5, 3)))
    return things


@pytest.mark.parametrize(
    ("offset", "answer"),
    [
        ((1, 0, 0), "right"), ((-1, 0.2, 0.5), "left"), ((0, 1, 0.3), "below"), ((0.1, -0.8, 0), "above"),
        ((0, 0, 1), "behind"), ((0.2, 0.1, -0.5), "in front"), ((0.2, 0, 0), None), ((1, 0, 0.7), None),
        ((0.5, 0.5, 0.5), None),
    ],
)  # fmt: skip
def test_direction_is_the_dominant_axis_of_the_gravity_frame(offset, answer):
    base = np.array([0.4, 0.1, 3.0])
    a, b = thing("chair", base + offset, (0, 0, 20, 20)), thing("table", base, (30, 30, 60, 60))
    assert direction(a, b) == answer
    found = answers([a, b])
    assert found.get("Where is the chair relative to the table?") == answer
    opposite = {"left": "right", "above": "below", "in front": "behind", None: None}
    opposite |= {v: k for k, v in opposite.items()}
    assert found.get("Where is the table relative to the chair?") == opposite[answer]


def test_every_answer_agrees_with_naive_geometry():
    """Re-derive each answer of random rooms from the question's words alone; every kind of question must occur."""
    rng, seen = np.random.default_rng(0), Counter()
    for seed in range(150):
        room = random_room(rng)
        for question in ask(room, seed=seed):
            assert question.answer == naive_answer(question, room), question
            assert len(question.answer.split()) <= 2 and question.answer == question.answer.lower()
            seen[question.template, question.answer] += 1
    assert len({template for template, _ in seen}) == 14  # all but color
    for template, _ in seen:
        if template.startswith("Is "):
            assert seen[template, "yes"] and seen[template, "no"]


def naive_answer(question, room):
    def only(noun):
        found = [t for t in room if t.noun == noun]
        assert len(found) == 1, "the question names something that is not unique"
        return found[0]

    visible = [t for t in room if t.mask.sum() >= 0.005 * SIZE * SIZE]
    words = question.text.rstrip("?").replace("the ", "").split()
    if question.type == "Object Identification":
        score = {"largest": lambda t: -t.mask.sum(), "closest": lambda t: t.depth_m, "farthest": lambda t: -t.depth_m}
        return min(visible, key=score[words[2]]).noun
    if question.type == "Count":
        plurals = {"sofas": "sofa", **{f"{noun}s": noun for noun in NOUNS}}
        return ["zero", "one", "two", "three", "four", "five", "six"][sum(t.noun == plurals[words[2]] for t in room)]
    if question.text.startswith("Is there"):
        return "yes" if any(t.noun == words[-1] for t in room) else "no"
    if question.type == "Proximity":
        target = only(words[-1])
        others = [t for t in visible if t is not target]
        return min(others, key=lambda t: np.linalg.norm(t.center_m - target.center_m)).noun
    if "closer" in words:
        a, x, b = (only(noun).center_m for noun in question.nouns)
        return "yes" if np.linalg.norm(a - x) < np.linalg.norm(b - x) else "no"
    a, b = (only(noun).center_m for noun in question.nouns)
    axis = np.abs(a - b).argmax()
    where = (("left", "right"), ("above", "below"), ("in front", "behind"))[axis][int(a[axis] > b[axis])]
    if question.type == "Direction":
        return where
    return "yes" if where in question.text else "no"


def test_twins_share_a_pair_and_contradict_each_other():
    rng = np.random.default_rng(1)
    pairs = defaultdict(list)
    for seed in range(100):
        for question in ask(random_room(rng), seed=seed):
            if question.pair:
                pairs[seed, question.pair].append(question)
    assert len(pairs) > 100
    for first, second in pairs.values():
        assert first.answer != second.answer and first.template == second.template
        assert sorted(first.nouns) == sorted(second.nouns) and first.text != second.text


def test_mirroring_a_room_swaps_left_and_right_only():
    rng = np.random.default_rng(2)
    for seed in range(30):
        room = random_room(rng)
        mirrored = [Instance(t.noun, t.mask[:, ::-1], t.depth_m, t.center_m * (-1, 1, 1), t.size_m) for t in room]
        swap = {"left": "right", "right": "left"}
        before = {q.text: q.answer for q in ask(room, seed=seed) if q.type != "Yes/No"}
        after = {q.text: q.answer for q in ask(mirrored, seed=seed) if q.type != "Yes/No"}
        assert after == {text: swap.get(answer, answer) for text, answer in before.items()}


def test_no_question_about_what_is_not_unique_or_not_clear():
    chair, other, table = (
        thing("chair", (0, 0, 2)),
        thing("chair", (1, 0, 2)),
        thing("table", (-1, 0, 4), (30, 30, 60, 60)),
    )
    found = answers([chair, other, table])
    assert not any("the chair" in text for text in found) and found["How many chairs are there?"] == "two"
    assert found["Is there a chair?"] == "yes"
    speck = thing("chair", (1, 0, 2), (0, 0, 2, 2))
    for options in ({"instances": [chair, speck, table]}, {"instances": [chair, table], "unsure": {"chair"}}):
        found = answers(**options)
        assert not any("the chair" in text or "many chairs" in text for text in found)
    assert "Is there a lamp?" in answers([table]) and "Is there a lamp?" not in answers([table], unsure={"lamp"})


def test_what_cannot_be_counted_is_neither_counted_nor_given_an_article():
    lone = [thing("soap", (-1, 0, 2)), thing("soap dish", (1, 0, 2), (30, 0, 50, 20))]
    found = answers(lone, vocabulary=("clothing", "towel"))
    assert found["Is there soap?"] == found["Is there a soap dish?"] == "yes"
    assert found["Is there clothing?"] == found["Is there a towel?"] == "no"
    assert found["Where is the soap relative to the soap dish?"] == "left"
    assert [text for text in found if text.startswith("How many")] == ["How many soap dishes are there?"]


def test_unknown_positions_and_depths_silence_what_needs_them():
    lost = Instance("chair", thing("chair").mask, np.nan, np.full(3, np.nan), None)
    bed, table = thing("bed", (1, 0, 2), (30, 0, 50, 20)), thing("table", (-1, 0, 4), (0, 30, 60, 60))
    found = answers([lost, bed, table])
    assert not any("relative" in text and "chair" in text for text in found)
    assert not any("closest" in text or "farthest" in text for text in found)
    assert found["What is the largest object in the image?"] == "table" and found["How many chairs are there?"] == "one"


def test_surfaces_must_agree_with_centres():
    """The ball touches the end of a long bed: by centres the bin is closer, by surfaces the bed."""
    ball, bed = thing("ball", (0, 0, 2), size=(0.3, 0.3, 0.3)), thing("bed", (1.2, 0, 2), size=(2, 0.6, 1))
    near = thing("bin", (-0.6, 0, 2), size=(0.3, 0.3, 0.3))
    assert "What is closest to the ball?" not in answers([ball, bed, near])
    small = thing("bed", (1.2, 0, 2), size=(0.4, 0.6, 0.4))
    assert answers([ball, small, near])["What is closest to the ball?"] == "bin"


def test_negatives_avoid_lookalikes_and_follow_the_vocabulary():
    texts = answers([thing("desk")], vocabulary=None)
    for here, there in (("shelf", "cabinet"), ("cabinet", "shelf")):  # the table lists one of the two only
        assert f"Is there a {there}?" not in answers([thing(here)], vocabulary=(there, "bed"))
    assert "Is there a table?" not in texts and "Is there a wall?" not in texts
    assert sum(answer == "no" for answer in texts.values()) == 12
    assert {t for t, a in answers([thing("bed")], vocabulary=("oven", "bed")).items() if a == "no"} == {
        "Is there an oven?"
    }


@pytest.mark.parametrize(
    ("name", "rgb"),
    [
        ("red", (190, 30, 30)), ("green", (40, 140, 60)), ("blue", (40, 80, 200)), ("yellow", (235, 205, 45)),
        ("orange", (240, 130, 20)), ("purple", (120, 40, 170)), ("pink", (240, 130, 180)), ("brown", (120, 75, 40)),
        ("white", (235, 235, 230)), ("gray", (120, 122, 118)), ("black", (20, 22, 25)),
    ],
)  # fmt: skip
def test_color_survives_noise_and_shading(name, rgb):
    rng = np.random.default_rng(0)
    shade = rng.uniform(0.75, 1, (3000, 1))
    pixels = np.clip(np.array(rgb) * shade + rng.normal(0, 4, (3000, 3)), 0, 255).astype(np.uint8)
    assert color_name(pixels) == name
    half = np.where(np.arange(3000)[:, None] % 2, pixels, np.roll(np.array(rgb[::-1]), 1) * 0 + (40, 140, 60)).astype(
        np.uint8
    )
    assert name == "green" or color_name(half) is None


def test_color_question_reads_the_masked_pixels_and_needs_color():
    rgb = np.full((SIZE, SIZE, 3), (40, 140, 60), np.uint8)
    rgb[:20, :20] = (190, 30, 30)
    found = [q for q in ask([thing("chair")], rgb=rgb) if q.type == "Color Identification"]
    assert [(q.text, q.answer, q.depth_answerable) for q in found] == [("What color is the chair?", "red", False)]
    assert found[0].target_box == (0, 0, 20, 20)
    assert not any(q.type == "Color Identification" for q in ask([thing("chair")]))
    assert all(q.depth_answerable for q in ask([thing("chair")]))


def frame(index, sensor="kv1"):
    path = f"SUNRGBD/{sensor}/test/{index:05d}"
    return SimpleNamespace(
        path=path, sensor=sensor, scene="office", image_path=f"{path}/image/a.jpg", depth_path=f"{path}/depth/a.png"
    )


@pytest.fixture(scope="module")
def leaky():
    """Rooms where nouns give answers away: each stands at its own distance, and nearly every room has a chair."""
    rng, frames = np.random.default_rng(3), []
    distance = dict(zip(NOUNS, np.linspace(1, 5, len(NOUNS)), strict=True))
    for index in range(400):
        room = random_room(rng)
        for t in room:
            t.center_m[2] = distance[t.noun] + rng.normal(0, 0.6)
        if rng.random() < 0.8 and not any(t.noun == "chair" for t in room):
            room.append(thing("chair", rng.uniform((-2, 0, 1), (2, 0.5, 5)), (40, 40, 60, 60)))
        frames.append((frame(index, sensor=("kv1", "xtion")[index % 2]), ask(room, seed=index)))
    return frames


def blind_accuracy(rows):
    """Per type: accuracy of the best answer per wording, and of one answer per type.

    Both are learned on half of the images and scored on the rest.
    """
    counts = defaultdict(Counter)
    first_half = set(sorted({row.image_path for row in rows})[::2])
    for row in (row for row in rows if row.image_path in first_half):
        for pool in (row.question, row.type):
            counts[pool][row.answer] += 1
    scores = defaultdict(list)
    for row in (row for row in rows if row.image_path not in first_half):
        exact, same = counts.get(row.question, counts[row.type]), counts[row.type]
        scores[row.type].append([pool.most_common(1)[0][0] == row.answer for pool in (exact, same)])
    return {kind: np.mean(hits, axis=0) for kind, hits in scores.items()}


def as_rows(frames):
    return [
        SimpleNamespace(type=q.type, question=q.text, answer=q.answer, image_path=f.image_path)
        for f, questions in frames
        for q in questions
    ]


def test_selection_removes_what_the_text_gives_away(leaky):
    before, after = blind_accuracy(as_rows(leaky)), blind_accuracy(select_questions(leaky, seed=0, per_frame=8))
    assert before["Yes/No"][0] > 0.55 and before["Direction"][0] > 0.4  # the leak that has to go
    for kind, (by_wording, by_type) in after.items():
        assert by_wording <= (0.55 if kind == "Yes/No" else by_type + 0.08), kind


@pytest.mark.parametrize("per_frame", [1, 2, 8, None])
def test_selection_keeps_its_promises(leaky, per_frame):
    rows = select_questions(leaky, seed=0, per_frame=per_frame)
    texts = {f.image_path: {q.text: q for q in questions} for f, questions in leaky}
    per_image = Counter(row.image_path for row in rows)
    assert per_frame is None or max(per_image.values()) <= per_frame
    assert per_frame is None or np.mean([per_image[f.image_path] for f, _ in leaky]) > 0.5 * per_frame
    assert len({row.id for row in rows}) == len(rows) == len({(row.image_path, row.question) for row in rows})
    for row in rows:  # nothing is invented
        question = texts[row.image_path][row.question]
        assert (question.answer, question.type, question.target_box) == (row.answer, row.type, row.target_box)
    yes = defaultdict(Counter)
    for row in rows:
        if row.type == "Yes/No":
            yes[row.question][row.answer] += 1
    assert yes and all(counts["yes"] == counts["no"] for counts in yes.values())
    types = Counter(row.type for row in rows)
    for kind, count in types.items():
        top = Counter(row.answer for row in rows if row.type == kind).most_common(1)[0][1]
        assert top <= ANSWER_SHARE[kind] * count + 2, kind
        assert count <= TYPE_EXCESS / len(types) * len(rows) * 1.1
    if per_frame == 2:
        assert set(types) == set(QUESTION_TYPES) - {"Color Identification"}
        assert min(types.values()) > 0.6 * max(types.values())


def test_balance_holds_for_nouns_in_their_place(leaky):
    """Rare wordings escape a cap on wordings; "the lamp is above" must not come back through them."""
    rows = [row for row in select_questions(leaky, seed=0, per_frame=8) if row.type == "Direction"]
    by_noun = defaultdict(Counter)
    for row in rows:
        by_noun[row.question.split(" relative")[0]][row.answer] += 1
    assert len(by_noun) >= 6
    for counts in by_noun.values():
        assert max(counts.values()) <= ANSWER_SHARE["Direction"] * sum(counts.values()) + 1


@pytest.fixture(scope="module")
def furnished():
    """Rooms of fifty nouns, some far more common than others, as in real annotations.

    Each noun has its usual height and usual neighbours.
    """
    rng, frames = np.random.default_rng(4), []
    names = [f"noun{i:02d}" for i in range(50)]
    odds = 1 / np.arange(3, 53)
    height, ground = np.linspace(-1.5, 1.5, 50)[rng.permutation(50)], rng.uniform((-3, 1), (3, 6), (50, 2))
    for index in range(500):
        room = []
        for i in rng.choice(50, size=9, replace=False, p=odds / odds.sum()):
            x, z = ground[i] + rng.normal(0, 2.5, 2)
            left, top = rng.integers(0, 60, 2)
            sides = rng.integers(12, 40, 2)
            room.append(
                thing(names[i], (x, height[i] + rng.normal(0, 1), z), (left, top, left + sides[0], top + sides[1]))
            )
        frames.append((frame(index), ask(room, seed=index, vocabulary=names)))
    return frames


@pytest.mark.parametrize(("train_per_frame", "eval_per_frame"), [(2, 8), (10, 10)])
def test_many_nouns_tell_no_more_than_few(furnished, train_per_frame, eval_per_frame):
    """Most wordings are rare here: what their nouns give away together has to be held by the sets of the nouns."""
    train = select_questions(furnished[:250], seed=0, per_frame=train_per_frame)
    test = select_questions(furnished[250:], seed=1, per_frame=eval_per_frame)
    judged = ("Object Identification", "Direction", "Proximity")
    assert min(Counter(row.type for row in test)[kind] for kind in judged) > 200
    assert blind_check([csv_cells(r) for r in train], [csv_cells(r) for r in test if r.type in judged]) == []


def test_types_do_not_depend_on_the_sensor(leaky):
    rows = select_questions(leaky, seed=0, per_frame=2)
    share = {sensor: Counter(row.type for row in rows if row.sensor == sensor) for sensor in ("kv1", "xtion")}
    for kind in share["kv1"]:
        ratio = share["kv1"][kind] / share["xtion"][kind]
        assert 0.5 < ratio < 2, kind  # and not none of one kind


def test_selection_is_reproducible_and_ids_are_stable(leaky):
    first = select_questions(leaky, seed=5, per_frame=2)
    assert first == select_questions(leaky, seed=5, per_frame=2) != select_questions(leaky, seed=6, per_frame=2)
    ids = {(row.image_path, row.question): row.id for row in select_questions(leaky[:50], seed=9, per_frame=None)}
    again = {(row.image_path, row.question): row.id for row in select_questions(leaky, seed=5, per_frame=None)}
    shared = ids.keys() & again.keys()
    assert len(shared) > 30 and all(ids[key] == again[key] for key in shared)


def test_pair_ids_stand_for_pairs_that_are_complete(leaky):
    pairs = defaultdict(list)
    for row in select_questions(leaky, seed=0, per_frame=8):
        if row.pair_id:
            pairs[row.pair_id].append(row)
    assert len(pairs) > 50
    for first, second in pairs.values():
        assert first.image_path == second.image_path and first.answer != second.answer


def test_the_choice_of_unlabelled_questions_does_not_depend_on_the_answers():
    """The same questions with all answers exchanged: the same choice, or the answers would shine through."""

    def asked(answer):
        kinds = [(kind, k) for kind in QUESTION_TYPES for k in range(4)]
        return [(frame(i), [Question(f"{kind} {k}?", answer, kind, "t") for kind, k in kinds]) for i in range(5)]

    options = dict(gold=(), seed=1, per_frame=7)
    chosen = select_unlabelled(asked("a"), **options)
    assert chosen == select_unlabelled(asked("b"), **options) != select_unlabelled(asked("a"), **options | {"seed": 2})
    per_type = Counter((row.image_path, row.type) for row in chosen)
    assert len(chosen) == 35 and max(per_type.values()) == 2 and not any(row.answer for row in chosen)
    gold = {row.id for row in chosen}
    assert not gold & {row.id for row in select_unlabelled(asked("a"), **options | {"gold": gold})}


def test_selection_of_nothing_is_empty():
    assert select_questions([], seed=0, per_frame=2) == [] == select_questions([(frame(0), [])], seed=0, per_frame=2)
    only_yes = [(frame(i), [Question("Is there a bed?", "yes", "Yes/No", "Is there {a}?", ("bed",))]) for i in range(9)]
    assert select_questions(only_yes, seed=0, per_frame=2) == []


@pytest.fixture
def written(tmp_path, leaky):
    rows = select_questions(leaky[:40], seed=0, per_frame=2)
    write_questions(tmp_path / "train.csv", rows)
    return tmp_path / "train.csv", rows


def test_file_round_trip(written):
    path, rows = written
    assert read_questions(path) == rows
    with open(path, newline="") as handle:
        assert next(csv.reader(handle)) == list(COLUMNS) and list(COLUMNS)[:6] == list(REQUIRED_COLUMNS)
    original = "Question_Id,Questions,Answers,Image_Path,Depth_Path,Question_Type"
    assert original == ",".join(REQUIRED_COLUMNS)


def test_bom_crlf_quotes_and_missing_columns_are_read(tmp_path):
    path = tmp_path / "q.csv"
    header = "Question_Type,Question_Id,Questions,Answers,Image_Path,Depth_Path,extra\r\n"
    lines = [
        'Color Identification,1,"Is it red, or ""blue""?",red,a/b.jpg,a/c.png,x',
        "Count,2,How many?, one ,a/b.jpg,a/c.png,y",
    ]
    path.write_bytes(("\ufeff" + header + "\r\n".join(lines) + "\r\n").encode())
    first, second = read_questions(path)
    assert first.question == 'Is it red, or "blue"?' and not first.depth_answerable and first.target_box is None
    assert second.answer == "one" and second.depth_answerable and second.sensor == "" == second.pair_id


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("Answers", " ", "Answers is empty"), ("Question_Id", "", "Question_Id is empty"),
        ("Question_Id", "a", "already in line 2"),
        ("Image_Path", "/etc/passwd", "stay inside"), ("Depth_Path", "a/../../b.png", "stay inside"),
        ("Image_Path", "C:\\x.jpg", "stay inside"), ("depth_answerable", "yes", "0 or 1"),
        ("target_box", "1 2 3", "four"), ("Image_Path", "a/image/none.jpg", "does not exist"),
        ("Depth_Path", "a/depth_bfx/c.png", "of one frame.*--depth_source"),
        ("Depth_Path", "z/depth/c.png", "of one frame"), ("Image_Path", "a/fullres/b.jpg", "of one frame"),
        ("Questions", "Is <image> it?", "Questions contains <image>"),
        ("Answers", "no<|im_end|>", r"Answers contains <\|im_end\|>"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path, column, value, message):
    for name in ("a/image/b.jpg", "a/fullres/b.jpg", "a/depth/c.png", "a/depth_bfx/c.png", "z/depth/c.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    good = {
        "Question_Id": "a",
        "Questions": "Is it?",
        "Answers": "yes",
        "Image_Path": "a/image/b.jpg",
        "Depth_Path": "a/depth/c.png",
    }
    good |= {"Question_Type": "Yes/No", "depth_answerable": "1", "target_box": "1 2 3 4"}
    path = tmp_path / "q.csv"
    for rows in ([good, {**good, "Question_Id": "b"}], [good, {**good, "Question_Id": "b", column: value}]):
        with open(path, "w", newline="") as handle:
            writer = csv.DictWriter(handle, list(good))
            writer.writeheader()
            writer.writerows(rows)
        if rows[1].get(column) == value:
            with pytest.raises(UserError, match=f"q.csv:3: .*{message}"):
                read_questions(path, root=tmp_path)
        else:
            assert len(read_questions(path, root=tmp_path)) == 2


def test_every_control_token_of_the_tokenizer_is_known(processor):
    assert set(CONTROL_TOKENS) == set(processor.tokenizer.get_added_vocab())


@pytest.mark.parametrize("content", [b"", b"Question_Id,Questions\n1,a\n", b"\xff\xfe\x00", None])
def test_unusable_files_are_named(tmp_path, content):
    path = tmp_path / "q.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="q.csv"):
        read_questions(path)


def test_a_short_row_is_named(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text(",".join(REQUIRED_COLUMNS) + "\n1,Is it?\n")
    with pytest.raises(UserError, match="q.csv:2: Answers is empty"):
        read_questions(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("chair", "ch\x1b[31mair"), "q.csv:2: Questions contains the control character"),
        (lambda text: text.replace("chair", "ch\0air"), "q.csv:2: Questions contains the control character"),
        (lambda text: text.rstrip("\n") + ",,,\n", "q.csv:2: has more cells than the first line has columns"),
        (lambda text: "a," * 5000 + text, "q.csv:1: has 5,006 columns"),
        (lambda text: text.replace("chair", "x" * 10_000_000), "q.csv: question file cannot be read .*field limit"),
    ],
)
def test_files_of_strangers_are_refused(tmp_path, change, message):
    text = ",".join(REQUIRED_COLUMNS) + "\n1,Is it a chair?,yes,a/image/b.jpg,a/depth/c.png,Yes/No\n"
    (tmp_path / "q.csv").write_text(change(text))
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / "q.csv")


def test_links_that_a_user_made_in_the_tree_are_followed(tmp_path):
    """The tree is the user's; a collection may lie on another disk. A question's own path may not lead out."""
    frame = tmp_path / "other_disk" / "frame"
    for name in ("image/b.jpg", "depth/c.png"):
        (frame / name).parent.mkdir(parents=True)
        (frame / name).touch()
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").symlink_to(frame)
    for place, reason in (("a", None), ("a/../a", "stay inside"), ("../other_disk/frame", "stay inside")):
        line = f"1,Is it?,yes,{place}/image/b.jpg,{place}/depth/c.png,Yes/No\n"
        (tmp_path / "q.csv").write_text(",".join(REQUIRED_COLUMNS) + "\n" + line)
        if reason is None:
            assert len(read_questions(tmp_path / "q.csv", root=root)) == 1
        else:
            with pytest.raises(UserError, match=reason):
                read_questions(tmp_path / "q.csv", root=root)
