import re
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ensemble.training.live_progress import PLAIN, LiveProgress
from ensemble.training.progress import window

EPOCH = {"epoch": 1, "train_loss": 0.6, "tune_auroc": 0.8, "tune_log_loss": 0.5, "tune_score": 0.8}
LINE = "  epoch 1/5: train loss 0.6000, tune AUROC 0.8000, tune log-loss 0.5000"


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def terminal(width=80, height=24):
    return Console(
        file=StringIO(), force_terminal=True, force_interactive=True, width=width, height=height, legacy_windows=False
    )


def screen(console):
    """What stands on the terminal after all that was written, moved and erased."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", console.file.getvalue()):
        if piece == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\r":
            column = 0
        elif piece.startswith("\x1b"):
            count, kind = re.fullmatch(r"\x1b\[([0-9;?]*)([A-Za-z])", piece).groups()
            row -= int(count or 1) if kind == "A" else 0
            lines[row] = "" if kind == "K" else lines[row]
        else:
            lines[row] = f"{lines[row][:column]:{column}}{piece}"
            column += len(piece)
    return "\n".join(line.rstrip() for line in lines).rstrip()


def row(console, name):
    (line,) = [line for line in screen(console).splitlines() if line.startswith(name)]
    return re.split(r"\s{2,}", line)


def steps(board, clock, first, last, seconds=1.0, images=32):
    for step in range(first, last + 1):
        clock.now += seconds
        board.step(step, 0.5, 1e-4, images)


def test_the_table_tells_what_each_member_is_doing():
    clock, console = Clock(), terminal()
    with LiveProgress(["swin", "vit", "convnext", "probe"], print, console=console, clock=clock) as board:
        assert row(console, "swin") == ["swin", "waiting"]
        board.finished("swin", "unchanged", score="0.9790")
        board.member("vit", "cuda")
        assert row(console, "vit") == ["vit", "starting on cuda"]
        board.part("", epochs=5, steps=500)
        assert row(console, "vit") == ["vit", "epoch 1/5"]
        steps(board, clock, 1, 200)
        assert row(console, "vit") == ["vit", "epoch 3/5", "5 min left"]
        assert "32 images/s" in screen(console)
        progress = board.scoring("tune", 100)
        assert row(console, "vit")[1] == "tuning"
        progress(60)
        board.epoch(EPOCH, better=True)
        assert row(console, "vit") == ["vit", "epoch 3/5", "0.8000", "5 min left"]
        board.scoring("held-out", 100)
        assert row(console, "vit")[1] == "held-out"
        board.finished("vit", "trained", score="0.9812", seconds=725)
        board.member("convnext", "cuda")
        board.finished("convnext", "failed", error="no memory")
        assert row(console, "swin") == ["swin", "unchanged", "0.9790"]
        assert row(console, "vit") == ["vit", "done", "0.8000", "0.9812", "12 min"]
        assert row(console, "convnext") == ["convnext", "failed: no memory"]
        assert "3 of 4 members, 3 min so far, about 12 min left" in screen(console)


def test_a_later_worse_epoch_leaves_the_score_of_the_best_one():
    console = terminal()
    with LiveProgress(["swin"], print, console=console) as board:
        board.member("swin", "cpu")
        board.part("fold 2/5", epochs=5, steps=500)
        board.epoch(EPOCH, better=True)
        board.epoch(EPOCH | {"epoch": 2, "tune_auroc": 0.7, "tune_score": 0.7}, better=False)
        assert row(console, "swin")[:3] == ["swin", "fold 2/5, epoch 1/5", "0.8000"]


def test_lines_stand_above_the_table():
    console = terminal()
    with LiveProgress(["swin"], print, console=console) as board:
        board.log("data: [bold]12[/bold] images")
        board.member("swin", "cpu")
        board.part("", epochs=5, steps=500)
        board.epoch(EPOCH, better=True)
        assert screen(console).splitlines()[:2] == ["data: [bold]12[/bold] images", f"{LINE}, best"]


def test_names_are_no_markup():
    console = terminal()
    with LiveProgress(["[red]a[/red]"], print, console=console):
        assert row(console, "[red]a[/red]") == ["[red]a[/red]", "waiting"]


@pytest.mark.parametrize(("width", "shown"), [(80, f"{'a' * 19}…"), (120, "a" * 40)])
def test_a_long_name_is_cut_where_the_terminal_is_narrow(width, shown):
    clock, console = Clock(), terminal(width)
    with LiveProgress(["a" * 40], print, console=console, clock=clock) as board:
        board.member("a" * 40, "cpu")
        board.part("fold 10/10", epochs=10, steps=100000)
        steps(board, clock, 1, 100, seconds=0.05, images=600)
        board.epoch(EPOCH, better=True)
        assert row(console, shown)[1:] == ["fold 10/10, epoch 1/10", "0.8000", "1 h 23 min left"]
        board.scoring("held-out", 10)
        assert row(console, shown)[1:] == ["fold 10/10, held-out", "0.8000", "0 s left"]
        assert max(map(len, screen(console).splitlines()[1:])) <= width


def test_many_members_leave_the_footer_on_the_screen():
    console = terminal(height=24)
    names = [f"member-{number:02}" for number in range(40)]
    with LiveProgress(names, print, console=console) as board:
        for name in names[:20]:
            board.finished(name, "unchanged")
        board.member("member-20", "cpu")
        board.part("", epochs=2, steps=10)
        shown = screen(console).splitlines()
        assert len(shown) < 24
        assert shown[-1].startswith("20 of 40 members")
        assert "and 22 more members" in shown
        assert row(console, "member-20")[1] == "epoch 1/2"


def test_many_members_at_once_fill_the_screen():
    console = terminal(height=24)
    names = [f"member-{number:02}" for number in range(20)]
    with LiveProgress(names, print, console=console, clock=Clock(), several=True) as board:
        for name in names:
            board.member(name, "a")
            board.part("", epochs=2, steps=10)
            board.step(1, 0.5, 1e-4, 32)
        board.finished("member-19", "trained")
        shown = screen(console).splitlines()
    assert 21 <= len(shown) < 24
    assert sum(line.startswith("member-") for line in shown) == 9
    assert "and 11 more members" in shown
    assert shown[-1].startswith("1 of 20 members")


@given(lines=st.lists(st.integers(1, 2), min_size=1, max_size=60), limit=st.integers(-3, 120), data=st.data())
def test_the_window_holds_the_current_row_and_as_many_more_as_fit(lines, limit, data):
    current = data.draw(st.integers(0, len(lines) - 1))
    shown = window(lines, current, limit)
    assert current in shown
    assert 0 <= shown.start <= shown.stop <= len(lines)
    taken = sum(lines[row] for row in shown)
    assert taken <= limit or len(shown) == 1
    beside = [row for row in (shown.start - 1, shown.stop) if 0 <= row < len(lines)]
    assert all(taken + lines[row] > limit for row in beside)


@pytest.mark.parametrize("done", [0, 100])
def test_speed_is_that_of_this_process_after_its_first_step(done):
    clock, console = Clock(), terminal()
    with LiveProgress(["swin"], print, console=console, clock=clock) as board:
        board.member("swin", "cpu")
        board.part("", epochs=4, steps=done + 200, done=done)
        clock.now += 500  # the first step compiles
        board.step(done + 1, 0.5, 1e-4, 32)
        steps(board, clock, done + 2, done + 20, seconds=2)
        assert row(console, "swin")[2] == "6 min left"  # 180 steps of 2 s


def test_folds_to_come_are_counted_by_their_share():
    clock, console = Clock(), terminal()
    with LiveProgress(["swin"], print, console=console, clock=clock) as board:
        board.member("swin", "cpu")
        board.part("fold 1/2", epochs=1, steps=100, done=100, share=0.4)
        board.part("fold 2/2", epochs=1, steps=100, share=0.4)
        steps(board, clock, 1, 40, seconds=6)
        assert row(console, "swin")[2] == "11 min left"  # 60 steps and a refit of 50, 6 s each


def test_a_part_that_begins_again_is_counted_once():
    clock, console = Clock(), terminal()
    with LiveProgress(["swin"], print, console=console, clock=clock) as board:
        board.member("swin", "cpu")
        board.part("fold 1/2", epochs=1, steps=100, share=0.5)
        board.part("fold 1/2", epochs=1, steps=100, share=0.5)  # with a smaller batch
        steps(board, clock, 1, 40, seconds=6)
        assert row(console, "swin")[2] == "16 min left"  # 60 and 100 steps


@pytest.mark.parametrize(("done", "left"), [(0, "1 min"), (900, "17 min")])
def test_a_member_that_was_resumed_stands_for_a_whole_one(done, left):
    clock, console = Clock(), terminal()
    with LiveProgress(["swin", "vit"], print, console=console, clock=clock) as board:
        board.member("swin", "cpu")
        board.part("", epochs=1, steps=1000, done=done)
        steps(board, clock, done + 1, done + 60)  # and then it is stopped early
        progress = board.scoring("held-out", 10)
        clock.now += 1000
        progress(4)
        assert row(console, "swin")[2] == "25 min left"
        board.finished("swin", "trained", seconds=60)
        assert screen(console).endswith(f"1 of 2 members, 18 min so far, about {left} left")


def test_waiting_members_count_as_expected_or_else_as_the_mean():
    clock, console = Clock(), terminal()
    with LiveProgress(["a", "b", "c"], print, {"b": 3600.0}, console=console, clock=clock) as board:
        assert row(console, "b") == ["b", "waiting", "about 1 h"]
        assert "about 3 h left" in screen(console)
        board.member("a", "cpu")
        board.part("", epochs=1, steps=120)
        steps(board, clock, 1, 61, seconds=60)
        # a: an hour left of two; b: one hour; c: their mean
        assert "0 of 3 members, 1 h 1 min so far, about 3 h 29 min left" in screen(console)


def test_many_quick_steps_draw_a_few_times():
    clock, console = Clock(), terminal()
    with LiveProgress(["swin"], print, console=console, clock=clock) as board:
        board.member("swin", "cpu")
        board.part("", epochs=1, steps=3000)
        before = console.file.getvalue().count("waiting") + console.file.getvalue().count("epoch 1/1")
        steps(board, clock, 1, 2000, seconds=0.001)
        drawn = console.file.getvalue().count("waiting") + console.file.getvalue().count("epoch 1/1") - before
        assert 1 <= drawn <= 2


def test_the_table_goes_once_all_is_done_and_stays_where_it_broke_off():
    done, broken = terminal(), terminal()
    with LiveProgress(["swin"], print, console=done) as board:
        board.log("a line")
    assert screen(done) == "a line"
    with pytest.raises(KeyboardInterrupt), LiveProgress(["swin"], print, console=broken):
        raise KeyboardInterrupt
    assert row(broken, "swin") == ["swin", "waiting"]


def test_without_a_terminal_there_are_plain_lines_alone(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    clock, said = Clock(), []
    with LiveProgress(["swin", "vit"], said.append, clock=clock) as board:
        board.log("data: 12 images")
        board.member("swin", "cpu")
        board.part("", epochs=5, steps=500)
        steps(board, clock, 1, 90)
        board.epoch(EPOCH, better=False)
        assert said == ["data: 12 images", LINE]
        steps(board, clock, 91, 181)
        assert said[2:] == [
            "  swin: epoch 2/5, step 180/500, loss 0.5000, lr 0.0001, 32 images/s, 5 min left; "
            "0 of 2 members, 3 min so far, about 14 min left"
        ]
        progress = board.scoring("held-out", 800)
        for _ in range(4):
            clock.now += PLAIN / 2
            progress(100)
        board.finished("swin", "trained", seconds=541)
    assert said[3].startswith("  swin: held-out, 200/800 images")
    assert said[4].startswith("  swin: held-out, 400/800 images, 1.1 images/s")
    assert len(said) == 5
    assert not re.search(r"[\x00-\x1f\x7f]", "".join(said))
    assert capsys.readouterr() == ("", "")


def test_the_check_for_control_characters_finds_a_terminals():
    console = terminal()
    with LiveProgress(["swin"], print, console=console) as board:
        board.log("a line")
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", console.file.getvalue())


def test_a_score_of_its_own_is_told():
    said = []
    with LiveProgress(["swin"], said.append) as board:
        board.member("swin", "cpu")
        board.part("fold 2/5", epochs=5, steps=500)
        board.epoch(EPOCH | {"tune_score": 0.71}, better=True)
        board.epoch(EPOCH | {"tune_score": -0.5}, better=True)
    assert said == [f"  fold 2/5, {LINE.strip()}, tune score 0.7100, best", f"  fold 2/5, {LINE.strip()}, best"]


def test_an_epoch_without_tune_rows_tells_its_loss():
    said = []
    with LiveProgress(["swin"], said.append) as board:
        board.member("swin", "cpu")
        board.part("refit", epochs=3, steps=300)
        board.epoch({"epoch": 1, "train_loss": 0.6}, better=False)
    assert said == ["  refit, epoch 1/3: train loss 0.6000"]


def test_members_that_are_trained_at_once_have_a_bar_each_and_lines_with_names():
    clock, console = Clock(), terminal()
    with LiveProgress(["swin", "vit", "probe"], print, console=console, clock=clock, several=True) as board:
        for name, where in (("swin", "a"), ("vit", "b")):
            board.member(name, where)
            board.part("", epochs=5, steps=500)
        assert row(console, "vit") == ["vit", "epoch 1/5 on b"]
        board.turn("swin")
        steps(board, clock, 1, 200)
        assert row(console, "swin") == ["swin", "epoch 3/5 on a", "5 min left"]
        assert row(console, "vit") == ["vit", "epoch 1/5 on b"], "of its own steps alone"
        board.epoch(EPOCH, better=True)
        assert row(console, "swin") == ["swin", "epoch 3/5 on a", "0.8000", "5 min left"]
        board.turn("vit")
        board.epoch(EPOCH, better=False)
        board.waits("swin")
        assert row(console, "swin") == ["swin", "waiting", "0.8000"]
        board.finished("vit", "trained", score="0.9812", seconds=725)
        assert row(console, "vit") == ["vit", "done", "0.9812", "12 min"]
    lines = screen(console).replace(",\nbest", ", best").splitlines()
    assert LINE.replace("  ", "  vit: ", 1) in lines
    assert LINE.replace("  ", "  swin: ", 1) + ", best" in lines
