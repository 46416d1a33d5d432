"""Unpacking the official archives: what is refused, what a kill costs, what a damaged or lying archive can do."""

import fcntl
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
import zlib
from collections import namedtuple

import pytest

from dataset.sunrgbd import extract
from dataset.sunrgbd.extract import extract_archives
from utils import ROOT, UserError

FRAME = "SUNRGBD/kv1/b3dodata/img_0001"
PICTURES = {
    f"{FRAME}/image/img_0001.jpg": b"colour" * 3000,
    f"{FRAME}/depth/img_0001_abs.png": bytes(range(256)) * 40,
    f"{FRAME}/scene.txt": b"office",
    f"{FRAME}/annotation/index.json": b"",
    "SUNRGBD/xtion/sun3ddata/place/scan/frame/scene.txt": b"kitchen",
}
TOOLBOX = {"SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat": b"mat", "SUNRGBDtoolbox/readme.txt": b"read me"}
JUNK = {"__MACOSX/SUNRGBD/._kv1": b"x", f"{FRAME}/image/._img_0001.jpg": b"x", f"{FRAME}/.DS_Store": b"x"}


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    """Flushing every disk of the machine takes long; one test looks at it."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def make_zip(path, files, *, mode=stat.S_IFREG | 0o644, method=zipfile.ZIP_DEFLATED):
    """A zip archive of (name, contents) or {name: contents}, in that order."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in files.items() if isinstance(files, dict) else files:
            entry = zipfile.ZipInfo("x")
            entry.filename = entry.orig_filename = name  # as it is: the constructor cleans names up
            entry.external_attr, entry.compress_type = mode << 16, method
            archive.writestr(entry, contents)
    return path


def patch_directory(path, name, offset, value):
    """Overwrite bytes of an entry's header in the central directory: 10 = method, 16 = CRC, 24 = size."""
    data = bytearray(path.read_bytes())
    start = data.rindex(name.encode()) - 46
    assert data[start : start + 4] == b"PK\x01\x02"
    data[start + offset : start + offset + len(value)] = value
    path.write_bytes(data)


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def sunrgbd(path):
    return {"SUNRGBD": path}


def test_both_archives_without_what_does_not_belong(root, tmp_path, capsys):
    archives = {
        "SUNRGBD": make_zip(tmp_path / "a.zip", {"SUNRGBD/": b""} | PICTURES | JUNK | {"notes/read.me": b"x"}),
        "SUNRGBDtoolbox": make_zip(tmp_path / "b.zip", {f"./{name}": data for name, data in TOOLBOX.items()}),
    }
    extract_archives(archives, root)
    assert tree(root) == PICTURES | TOOLBOX
    assert sorted(p.name for p in root.iterdir()) == ["SUNRGBD", "SUNRGBDtoolbox"]
    said = capsys.readouterr()
    assert "a.zip: 5 files, 0.0 MB" in said.out and "1 files beside SUNRGBD are left out (notes)" in said.out
    assert "unpacking a.zip, files: 5/5" in said.err


@pytest.mark.parametrize(
    "name",
    [
        "../evil", "SUNRGBD/../../evil", "SUNRGBD/kv1/..", "/evil", "//evil", "C:/evil", "c:evil", "..\\evil",
        "SUNRGBD/a\\..\\b",
        "SUNRGBD/kv1/a.jpg\0.txt", "__MACOSX/../evil",
    ],
)  # fmt: skip
def test_names_that_lead_out_are_refused_before_anything_is_written(root, tmp_path, name):
    path = make_zip(tmp_path / "a.zip", PICTURES | {name: b"evil"})
    with pytest.raises(UserError, match="a.zip: .*leads out of the folder; nothing was unpacked") as error:
        extract_archives(sunrgbd(path), root)
    assert repr(name) in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "data"] and not any(root.iterdir())


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_are_refused(root, tmp_path, kind):
    path = make_zip(tmp_path / "a.zip", {"SUNRGBD/kv1": b"/etc"}, mode=kind | 0o777)
    with pytest.raises(UserError, match="'SUNRGBD/kv1' is refused: it is a link"):
        extract_archives(sunrgbd(path), root)
    assert not any(root.iterdir())


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ([("SUNRGBD/a", b"1"), ("SUNRGBD/a", b"2")], "SUNRGBD/a' is in it twice"),
        ([("SUNRGBD/b/a", b"1"), ("SUNRGBD/./b//a", b"2")], "is in it twice"),
        ([("SUNRGBD/b/c/a", b"1"), ("SUNRGBD/b", b"2")], "SUNRGBD/b is both a file and a folder"),
        (list(TOOLBOX.items()), "no folder SUNRGBD but SUNRGBDtoolbox; give the official SUNRGBD.zip"),
        ([("data/SUNRGBD/kv1/a", b"1")], "no folder SUNRGBD but data"),
        ([("SUNRGBD/", b"")], "no folder SUNRGBD but nothing"),
        ([("SUNRGBD", b"a file")], "no folder SUNRGBD but SUNRGBD"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_of_another_shape_are_refused(root, tmp_path, files, complaint):
    with pytest.raises(UserError, match=complaint):
        extract_archives(sunrgbd(make_zip(tmp_path / "a.zip", files)), root)
    assert not any(root.iterdir())


@pytest.mark.parametrize(("offset", "value"), [(8, b"\1\0"), (10, b"\x09\0")])
def test_encrypted_or_unknown_packing_is_refused(root, tmp_path, offset, value):
    path = make_zip(tmp_path / "a.zip", PICTURES)
    patch_directory(path, f"{FRAME}/scene.txt", offset, value)
    with pytest.raises(UserError, match="scene.txt' is refused: it is encrypted or packed with method"):
        extract_archives(sunrgbd(path), root)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("declared", [5, 17_999, 18_001, 10**6])
@pytest.mark.parametrize("honest_crc", [True, False])
def test_no_file_is_larger_than_declared(root, tmp_path, method, declared, honest_crc):
    """Also when the checksum was made to fit what a reader sees that stops at the declared size."""
    name = f"{FRAME}/image/img_0001.jpg"
    path = make_zip(tmp_path / "a.zip", PICTURES, method=method)
    patch_directory(path, name, 24, declared.to_bytes(4, "little"))
    if not honest_crc:
        patch_directory(path, name, 16, zlib.crc32(PICTURES[name][:declared]).to_bytes(4, "little"))
    fits = declared < len(PICTURES[name]) and not honest_crc  # then the entry is a shorter one that is whole
    if fits:
        extract_archives(sunrgbd(path), root)
        assert tree(root)[name] == PICTURES[name][:declared]
        return
    with pytest.raises(UserError, match=f"{name} is damaged"):
        extract_archives(sunrgbd(path), root)
    assert not (root / "SUNRGBD").exists()
    assert (root / ".SUNRGBD.part" / name.removeprefix("SUNRGBD/")).stat().st_size <= declared


def test_a_damaged_entry_is_named_and_a_sound_archive_goes_on(root, tmp_path):
    path = make_zip(tmp_path / "a.zip", PICTURES, method=zipfile.ZIP_STORED)
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b"kitchen", b"kitsch!", 1))
    with pytest.raises(UserError, match="a.zip: SUNRGBD/xtion/.*/scene.txt is damaged .*download the archive again"):
        extract_archives(sunrgbd(path), root)
    kept = root / ".SUNRGBD.part" / "kv1/b3dodata/img_0001/scene.txt"
    os.utime(kept, (1, 1))
    path.write_bytes(sound)
    extract_archives(sunrgbd(path), root)
    assert tree(root) == PICTURES and (root / FRAME / "scene.txt").stat().st_mtime == 1


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [
        (lambda data: data[:-10], "not downloaded to its end"),
        (lambda data: data[: len(data) // 2], "not downloaded to its end"),
        (lambda data: b"<html>404</html>", "is not a zip archive"),
        (lambda data: b"", "is not a zip archive"),
    ],
)
def test_files_that_are_no_whole_zip_archive(root, tmp_path, contents, complaint):
    path = make_zip(tmp_path / "a.zip", PICTURES)
    path.write_bytes(contents(path.read_bytes()))
    with pytest.raises(UserError, match=f"a.zip .*{complaint}"):
        extract_archives(sunrgbd(path), root)
    assert not any(root.iterdir())


def test_missing_files_and_folders(root, tmp_path):
    with pytest.raises(UserError, match="none.zip: cannot be opened .No such file"):
        extract_archives(sunrgbd(tmp_path / "none.zip"), root)
    with pytest.raises(UserError, match="data: cannot be opened .Is a directory"):
        extract_archives(sunrgbd(root), root)
    with pytest.raises(UserError, match="elsewhere: no such folder"):
        extract_archives(sunrgbd(make_zip(tmp_path / "a.zip", PICTURES)), tmp_path / "elsewhere")


def test_room_for_all_archives_is_asked_for_first(root, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    needed = {"SUNRGBD": 5 + 3 + 1 + 0 + 1, "SUNRGBDtoolbox": 1 + 1}  # blocks of 4096 bytes
    archives = {
        "SUNRGBD": make_zip(tmp_path / "a.zip", PICTURES),
        "SUNRGBDtoolbox": make_zip(tmp_path / "b.zip", TOOLBOX),
    }
    free = (sum(needed.values()) - 1) * 4096
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(free, 0, free))
    with pytest.raises(UserError, match="data: 0.0 MB are needed and 0.0 MB free"):
        extract_archives(archives, root)
    assert not any(root.iterdir())
    # what an earlier call unpacked is not needed again
    (root / ".SUNRGBD.part" / "kv1/b3dodata/img_0001").mkdir(parents=True)
    (root / ".SUNRGBD.part" / "kv1/b3dodata/img_0001/scene.txt").write_bytes(b"office")
    extract_archives(archives, root)
    assert tree(root) == PICTURES | TOOLBOX and "of them unpacked before" in capsys.readouterr().out


def test_the_disk_fills_up_while_unpacking(root, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = make_zip(tmp_path / "a.zip", PICTURES)
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="No space left on device.*same command continues"),
    ):
        patch.setattr(shutil, "copyfileobj", full)
        extract_archives(sunrgbd(path), root)
    extract_archives(sunrgbd(path), root)
    assert tree(root) == PICTURES


class Killed(BaseException):
    pass


def stop_at(number, monkeypatch, stop):
    """Unpack half of the file with this number, then stop. Returns the list of all file names begun."""
    begun = []
    copy = shutil.copyfileobj

    def interrupted(packed, target, length):
        begun.append(target.name)
        if len(begun) == number:
            target.write(packed.read()[: -len(begun)])
            target.flush()
            stop()
        copy(packed, target, length)

    monkeypatch.setattr(shutil, "copyfileobj", interrupted)
    return begun


@pytest.mark.parametrize("number", range(1, len(PICTURES) + 1))
def test_an_interruption_costs_one_file(root, tmp_path, monkeypatch, number):
    def stop():
        raise Killed

    path = make_zip(tmp_path / "a.zip", PICTURES)
    begun = stop_at(number, monkeypatch, stop)
    with pytest.raises(Killed):
        extract_archives(sunrgbd(path), root)
    assert not (root / "SUNRGBD").exists()
    extract_archives(sunrgbd(path), root)
    assert tree(root) == PICTURES
    assert len(begun) <= len(PICTURES) + 1 and len(set(begun)) == len(PICTURES)


def test_a_killed_process(root, tmp_path):
    """SIGKILL in the middle of the third file."""
    path = make_zip(tmp_path / "a.zip", PICTURES)
    code = f"""
import os, shutil, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from dataset.sunrgbd.extract import extract_archives
files, copy = [], shutil.copyfileobj
def kill(packed, target, length):
    files.append(target)
    if len(files) == 3:
        target.write(b"off")
        target.flush()
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    copy(packed, target, length)
shutil.copyfileobj = kill
extract_archives({{"SUNRGBD": Path({str(path)!r})}}, Path({str(root)!r}))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    part = root / ".SUNRGBD.part"
    assert sorted(map(len, tree(part).values())) == [3, 10_240, 18_000] and not (root / "SUNRGBD").exists()
    extract_archives(sunrgbd(path), root)
    assert tree(root) == PICTURES and not part.exists()


def test_what_lies_in_the_part_folder_is_not_believed(root, tmp_path):
    """A power cut leaves zeros; another archive, or someone else, leaves other files and links."""
    outside = tmp_path / "outside"
    (outside / "img_0001").mkdir(parents=True)
    frame = root / ".SUNRGBD.part" / "kv1" / "b3dodata" / "img_0001"
    frame.mkdir(parents=True)
    (frame / "scene.txt").write_bytes(bytes(6))
    (frame / "other.jpg").write_bytes(b"of another archive")
    (frame / "image").symlink_to(outside)
    (frame / "depth").mkdir()
    (outside / "mine").write_bytes(PICTURES[f"{FRAME}/depth/img_0001_abs.png"])
    (frame / "depth" / "img_0001_abs.png").symlink_to(outside / "mine")
    extract_archives(sunrgbd(make_zip(tmp_path / "a.zip", PICTURES)), root)
    assert tree(root) == PICTURES and not any(p.is_symlink() for p in root.rglob("*"))
    assert sorted(p.name for p in outside.iterdir()) == ["img_0001", "mine"]


def test_a_part_folder_that_is_none(root, tmp_path):
    (root / ".SUNRGBD.part").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"\.SUNRGBD\.part: in the way of unpacking; remove it"):
        extract_archives(sunrgbd(make_zip(tmp_path / "a.zip", PICTURES)), root)


def test_what_is_there_already_stays(root, tmp_path):
    archives = {
        "SUNRGBD": make_zip(tmp_path / "a.zip", PICTURES),
        "SUNRGBDtoolbox": make_zip(tmp_path / "b.zip", TOOLBOX),
    }
    (root / "SUNRGBD").mkdir()  # empty: made in advance
    (root / "SUNRGBDtoolbox").mkdir()
    (root / "SUNRGBDtoolbox" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="SUNRGBDtoolbox is there already: leave out the flag for b.zip"):
        extract_archives(archives, root)
    assert not tree(root / "SUNRGBD")
    extract_archives({"SUNRGBD": archives["SUNRGBD"]}, root)
    assert tree(root) == PICTURES | {"SUNRGBDtoolbox/mine.txt": b"mine"}


def test_two_processes_do_not_unpack_into_one_folder(root, tmp_path):
    handle = os.open(root, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    path = make_zip(tmp_path / "a.zip", PICTURES)
    with pytest.raises(UserError, match="another process is unpacking there"):
        extract_archives(sunrgbd(path), root)
    os.close(handle)
    extract_archives(sunrgbd(path), root)


def test_contents_reach_the_disk_before_the_name(root, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "sync", lambda: seen.append((tree(root / ".SUNRGBD.part"), (root / "SUNRGBD").exists())))
    extract_archives(sunrgbd(make_zip(tmp_path / "a.zip", PICTURES)), root)
    assert seen == [({name.removeprefix("SUNRGBD/"): data for name, data in PICTURES.items()}, False)]


def test_many_folders(root, tmp_path):
    names = [f"SUNRGBD/kv2/{i % 7}/{i % 70}/{i}.txt" for i in range(700)]
    assert extract._folders(names) == {"SUNRGBD", "SUNRGBD/kv2"} | {n.rsplit("/", k)[0] for n in names for k in (1, 2)}


def test_random_damage_ends_in_one_message_or_in_true_files(root, tmp_path):
    path = make_zip(tmp_path / "a.zip", PICTURES)
    sound = path.read_bytes()
    refused = 0
    for seed in range(300):
        rng, data = random.Random(seed), bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            extract_archives(sunrgbd(path), root)
            assert tree(root).items() <= PICTURES.items()
        except UserError:
            refused += 1
        for folder in root.iterdir():
            shutil.rmtree(folder)
    assert refused > 100


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({f"SUNRGBD/{'x' * 400}.jpg": b"x"}, "longer than a disk can take"),
        ({"SUNRGBD/" + "d/" * 90 + "a.jpg": b"x"}, "longer than a disk can take"),
        ({"SUNRGBD/\x1b[31m.jpg": b"x"}, "has control characters"),
        ({f"{FRAME}/depth/0.png": bytes(20_000_000)}, "would be 20.0 MB unpacked, .* no picture .* reaches 100"),
    ],
)
def test_what_no_archive_of_the_data_set_has_is_refused(root, tmp_path, files, complaint):
    path = make_zip(tmp_path / "a.zip", PICTURES | files)
    with pytest.raises(UserError, match=f"refused: .*{complaint}.*; nothing was unpacked"):
        extract_archives(sunrgbd(path), root)
    assert not any(root.iterdir())


def test_many_small_files_that_unpack_to_too_much_are_refused(root, tmp_path, monkeypatch):
    """Each may be anything, such as a map of labels; all of them together may not."""
    path = make_zip(tmp_path / "a.zip", PICTURES | {f"{FRAME}/seg{i}.mat": bytes(2_000_000) for i in range(5)})
    extract_archives(sunrgbd(path), root)
    shutil.rmtree(root / "SUNRGBD")
    monkeypatch.setattr(extract, "SMALL_IN_ALL", 1_000_000)
    with pytest.raises(UserError, match="would be 10.0 MB unpacked, more than 20 times its size"):
        extract_archives(sunrgbd(path), root)
    assert not any(root.iterdir())


def test_too_many_files_and_a_directory_that_lies_about_sizes_are_refused(root, tmp_path, monkeypatch):
    path = make_zip(tmp_path / "a.zip", PICTURES)
    patch_directory(path, f"{FRAME}/scene.txt", 20, (10**6).to_bytes(4, "little"))  # packed size
    with pytest.raises(UserError, match="its files are said to be 1.0 MB packed"):
        extract_archives(sunrgbd(path), root)
    monkeypatch.setattr(extract, "MOST_FILES", 3)
    with pytest.raises(UserError, match="it has 5 files"):
        extract_archives(sunrgbd(path), root)
    assert not any(root.iterdir())
