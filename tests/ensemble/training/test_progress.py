import re
from io import StringIO

import pytest
from rich.console import Console

from ensemble.training.progress import LOG_SECONDS, LiveProgress

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


def steps(progress, clock, first, last, seconds=1.0, images=32):
    for step in range(first, last + 1):
        clock.now += seconds
        progress.on_step(step, 0.5, 1e-4, images)


def test_the_table_tells_what_each_member_is_doing():
    clock, console = Clock(), terminal()
    with LiveProgress(["swin", "vit", "convnext", "probe"], print, console=console, clock=clock) as progress:
        assert row(console, "swin") == ["swin", "waiting"]
        progress.end_member("swin", "unchanged", score="0.9790")
        progress.begin_member("vit", "cuda")
        assert row(console, "vit") == ["vit", "starting on cuda"]
        progress.on_fit_begin("", epochs=5, steps=500)
        assert row(console, "vit") == ["vit", "epoch 1/5"]
        steps(progress, clock, 1, 200)
        assert row(console, "vit") == ["vit", "epoch 3/5", "5 min left"]
        assert "32 images/s" in screen(console)
        scored = progress.on_scoring("tune", 100)
        assert row(console, "vit")[1] == "tuning"
        scored(60)
        progress.on_epoch_end(EPOCH, better=True)
        assert row(console, "vit") == ["vit", "epoch 3/5", "0.8000", "5 min left"]
        progress.on_scoring("held-out", 100)
        assert row(console, "vit")[1] == "held-out"
        progress.end_member("vit", "trained", score="0.9812", seconds=725)
        progress.begin_member("convnext", "cuda")
        progress.end_member("convnext", "failed", error="no memory")
        assert row(console, "swin") == ["swin", "unchanged", "0.9790"]
        assert row(console, "vit") == ["vit", "done", "0.8000", "0.9812", "12 min"]
        assert row(console, "convnext") == ["convnext", "failed: no memory"]
        assert "3 of 4 members, 3 min so far, about 12 min left" in screen(console)


def test_a_later_worse_epoch_leaves_the_score_of_the_best_one():
    console = terminal()
    with LiveProgress(["swin"], print, console=console) as progress:
        progress.begin_member("swin", "cpu")
        progress.on_fit_begin("fold 2/5", epochs=5, steps=500)
        progress.on_epoch_end(EPOCH, better=True)
        progress.on_epoch_end(EPOCH | {"epoch": 2, "tune_auroc": 0.7, "tune_score": 0.7}, better=False)
        assert row(console, "swin")[:3] == ["swin", "fold 2/5, epoch 1/5", "0.8000"]


def test_lines_stand_above_the_table():
    console = terminal()
    with LiveProgress(["swin"], print, console=console) as progress:
        progress.log("data: [bold]12[/bold] images")
        progress.begin_member("swin", "cpu")
        progress.on_fit_begin("", epochs=5, steps=500)
        progress.on_epoch_end(EPOCH, better=True)
        assert screen(console).splitlines()[:2] == ["data: [bold]12[/bold] images", f"{LINE}, best"]


def test_names_are_no_markup():
    console = terminal()
    with LiveProgress(["[red]a[/red]"], print, console=console):
        assert row(console, "[red]a[/red]") == ["[red]a[/red]", "waiting"]


@pytest.mark.parametrize(("width", "shown"), [(80, f"{'a' * 19}…"), (120, "a" * 40)])
def test_a_long_name_is_cut_where_the_terminal_is_narrow(width, shown):
    clock, console = Clock(), terminal(width)
    with LiveProgress(["a" * 40], print, console=console, clock=clock) as progress:
        progress.begin_member("a" * 40, "cpu")
        progress.on_fit_begin("fold 10/10", epochs=10, steps=100000)
        steps(progress, clock, 1, 100, seconds=0.05, images=600)
        progress.on_epoch_end(EPOCH, better=True)
        assert row(console, shown)[1:] == ["fold 10/10, epoch 1/10", "0.8000", "1 h 23 min left"]
        progress.on_scoring("held-out", 10)
        assert row(console, shown)[1:] == ["fold 10/10, held-out", "0.8000", "0 s left"]
        assert max(map(len, screen(console).splitlines()[1:])) <= width


def test_many_members_leave_the_footer_on_the_screen():
    console = terminal(height=24)
    names = [f"member-{number:02}" for number in range(40)]
    with LiveProgress(names, print, console=console) as progress:
        for name in names[:20]:
            progress.end_member(name, "unchanged")
        progress.begin_member("member-20", "cpu")
        progress.on_fit_begin("", epochs=2, steps=10)
        shown = screen(console).splitlines()
        assert len(shown) < 24
        assert shown[-1].startswith("20 of 40 members")
        assert "and 22 more members" in shown
        assert row(console, "member-20")[1] == "epoch 1/2"


@pytest.mark.parametrize("done", [0, 100])
def test_speed_is_that_of_this_process_after_its_first_step(done):
    clock, console = Clock(), terminal()
    with LiveProgress(["swin"], print, console=console, clock=clock) as progress:
        progress.begin_member("swin", "cpu")
        progress.on_fit_begin("", epochs=4, steps=done + 200, done=done)
        clock.now += 500  # the first step compiles
        progress.on_step(done + 1, 0.5, 1e-4, 32)
        steps(progress, clock, done + 2, done + 20, seconds=2)
        assert row(console, "swin")[2] == "6 min left"  # 180 steps of 2 s


def test_folds_to_come_are_counted_by_their_share():
    clock, console = Clock(), terminal()
    with LiveProgress(["swin"], print, console=console, clock=clock) as progress:
        progress.begin_member("swin", "cpu")
        progress.on_fit_begin("fold 1/2", epochs=1, steps=100, done=100, share=0.4)
        progress.on_fit_begin("fold 2/2", epochs=1, steps=100, share=0.4)
        steps(progress, clock, 1, 40, seconds=6)
        assert row(console, "swin")[2] == "11 min left"  # 60 steps and a refit of 50, 6 s each


def test_a_part_that_begins_again_is_counted_once():
    clock, console = Clock(), terminal()
    with LiveProgress(["swin"], print, console=console, clock=clock) as progress:
        progress.begin_member("swin", "cpu")
        progress.on_fit_begin("fold 1/2", epochs=1, steps=100, share=0.5)
        progress.on_fit_begin("fold 1/2", epochs=1, steps=100, share=0.5)  # with a smaller batch
        steps(progress, clock, 1, 40, seconds=6)
        assert row(console, "swin")[2] == "16 min left"  # 60 and 100 steps


@pytest.mark.parametrize(("done", "left"), [(0, "1 min"), (900, "17 min")])
def test_a_member_that_was_resumed_stands_for_a_whole_one(done, left):
    clock, console = Clock(), terminal()
    with LiveProgress(["swin", "vit"], print, console=console, clock=clock) as progress:
        progress.begin_member("swin", "cpu")
        progress.on_fit_begin("", epochs=1, steps=1000, done=done)
        steps(progress, clock, done + 1, done + 60)  # and then it is stopped early
        scored = progress.on_scoring("held-out", 10)
        clock.now += 1000
        scored(4)
        assert row(console, "swin")[2] == "25 min left"
        progress.end_member("swin", "trained", seconds=60)
        assert screen(console).endswith(f"1 of 2 members, 18 min so far, about {left} left")


def test_waiting_members_count_as_the_mean():
    clock, console = Clock(), terminal()
    with LiveProgress(["a", "b", "c"], print, console=console, clock=clock) as progress:
        assert screen(console).endswith("0 of 3 members, 0 s so far")
        progress.begin_member("a", "cpu")
        progress.on_fit_begin("", epochs=1, steps=120)
        steps(progress, clock, 1, 61, seconds=60)
        # a: 59 minutes left of two hours; b and c: as long as a
        assert "0 of 3 members, 1 h 1 min so far, about 4 h 59 min left" in screen(console)


def test_many_quick_steps_draw_a_few_times():
    clock, console = Clock(), terminal()
    with LiveProgress(["swin"], print, console=console, clock=clock) as progress:
        progress.begin_member("swin", "cpu")
        progress.on_fit_begin("", epochs=1, steps=3000)
        before = console.file.getvalue().count("waiting") + console.file.getvalue().count("epoch 1/1")
        steps(progress, clock, 1, 2000, seconds=0.001)
        drawn = console.file.getvalue().count("waiting") + console.file.getvalue().count("epoch 1/1") - before
        assert 1 <= drawn <= 2


def test_the_table_goes_once_all_is_done_and_stays_where_it_broke_off():
    done, broken = terminal(), terminal()
    with LiveProgress(["swin"], print, console=done) as progress:
        progress.log("a line")
    assert screen(done) == "a line"
    with pytest.raises(KeyboardInterrupt), LiveProgress(["swin"], print, console=broken):
        raise KeyboardInterrupt
    assert row(broken, "swin") == ["swin", "waiting"]


def test_without_a_terminal_there_are_plain_lines_alone(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    clock, said = Clock(), []
    with LiveProgress(["swin", "vit"], said.append, clock=clock) as progress:
        progress.log("data: 12 images")
        progress.begin_member("swin", "cpu")
        progress.on_fit_begin("", epochs=5, steps=500)
        steps(progress, clock, 1, 90)
        progress.on_epoch_end(EPOCH, better=False)
        assert said == ["data: 12 images", LINE]
        steps(progress, clock, 91, 181)
        assert said[2:] == [
            "  swin: epoch 2/5, step 180/500, loss 0.5000, lr 0.0001, 32 images/s, 5 min left; "
            "0 of 2 members, 3 min so far, about 14 min left"
        ]
        scored = progress.on_scoring("held-out", 800)
        for _ in range(4):
            clock.now += LOG_SECONDS / 2
            scored(100)
        progress.end_member("swin", "trained", seconds=541)
    assert said[3].startswith("  swin: held-out, 200/800 images")
    assert said[4].startswith("  swin: held-out, 400/800 images, 1.1 images/s")
    assert len(said) == 5
    assert not re.search(r"[\x00-\x1f\x7f]", "".join(said))
    assert capsys.readouterr() == ("", "")


def test_the_check_for_control_characters_finds_a_terminals():
    console = terminal()
    with LiveProgress(["swin"], print, console=console) as progress:
        progress.log("a line")
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", console.file.getvalue())


def test_a_score_of_its_own_is_told():
    said = []
    with LiveProgress(["swin"], said.append) as progress:
        progress.begin_member("swin", "cpu")
        progress.on_fit_begin("fold 2/5", epochs=5, steps=500)
        progress.on_epoch_end(EPOCH | {"tune_score": 0.71}, better=True)
        progress.on_epoch_end(EPOCH | {"tune_score": -0.5}, better=True)
    assert said == [f"  fold 2/5, {LINE.strip()}, tune score 0.7100, best", f"  fold 2/5, {LINE.strip()}, best"]


def test_an_epoch_without_tune_rows_tells_its_loss():
    said = []
    with LiveProgress(["swin"], said.append) as progress:
        progress.begin_member("swin", "cpu")
        progress.on_fit_begin("refit", epochs=3, steps=300)
        progress.on_epoch_end({"epoch": 1, "train_loss": 0.6}, better=False)
    assert said == ["  refit, epoch 1/3: train loss 0.6000"]
