import pytest
from accelerate import tracking as accelerate_tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ensemble.core.errors import UnavailableError
from ensemble.training import tracking
from ensemble.training.tracking import check_trackers, open_trackers


def points(folder, name):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def fit(folder, losses, done=0, name="swin"):
    trackers = open_trackers(["tensorboard"], folder, name, {}, done)
    for step, loss in enumerate(losses, start=done + 1):
        trackers.log({"loss": loss, "lr": loss / 100}, step)
    trackers.close()


class Recorder(accelerate_tracking.GeneralTracker):
    """A tracker that keeps what it was told."""

    name = "recorder"
    requires_logging_directory = True
    told: list = []  # noqa: RUF012

    def __init__(self, project, logging_dir):
        super().__init__()
        self.told.append((project, logging_dir))

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.told.append(values)

    def log(self, values, step):
        self.told.append((step, values))

    def finish(self):
        self.told.append("finished")


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["recorder", "tensorboard"])
    monkeypatch.setattr(Recorder, "told", [])
    return Recorder


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    fit(tmp_path, [0.75, 0.5, 0.25])
    assert points(tmp_path / "swin", "loss") == [(1, 0.75), (2, 0.5), (3, 0.25)]
    assert points(tmp_path / "swin", "lr") == [(step, pytest.approx(1 / 100 * (1 - step / 4))) for step in (1, 2, 3)]


@pytest.mark.parametrize("done", [0, 2])
def test_a_resumed_fit_goes_on_in_the_same_curve(tmp_path, done):
    fit(tmp_path, [1.0, 0.75, 0.5])  # stopped at 3, its last checkpoint after `done`
    fit(tmp_path, [0.25, 0.125], done)
    kept = [(1, 1.0), (2, 0.75)][:done]
    assert points(tmp_path / "swin", "loss") == [*kept, (done + 1, 0.25), (done + 2, 0.125)]


def test_folds_have_logs_of_their_own(tmp_path):
    for fold in (1, 2):
        fit(tmp_path, [fold], name=f"swin/fold-{fold}")
    assert points(tmp_path / "swin" / "fold-1", "loss") == [(1, 1)]
    assert points(tmp_path / "swin" / "fold-2", "loss") == [(1, 2)]


def test_none_writes_nothing(tmp_path):
    trackers = open_trackers(["none"], tmp_path, "swin", {})
    trackers.log({"loss": 0.5}, 1)
    trackers.close()
    assert list(tmp_path.iterdir()) == []


def test_other_trackers_are_told_the_configuration_and_the_numbers(tmp_path, recorder):
    config = {"train": {"lr": 1e-4, "ema": None}, "crop": (0.5, 1.0)}
    trackers = open_trackers(["recorder", "recorder"], tmp_path, "swin", config)
    trackers.log({"loss": 0.5}, 7)
    trackers.close()
    assert recorder.told == [
        ("manyeyes", str(tmp_path)),
        {"train.lr": 1e-4, "train.ema": None, "crop": "(0.5, 1.0)"},
        (7, {"loss": 0.5}),
        "finished",
    ]


def test_a_tracker_that_does_not_start_says_why_in_one_line(tmp_path, recorder, monkeypatch):
    def refuse(self):
        raise ValueError("no API key; log in first\nmore")

    monkeypatch.setattr(recorder, "start", refuse)
    with pytest.raises(UnavailableError) as error:
        open_trackers(["recorder"], tmp_path, "swin", {})
    assert str(error.value) == "the tracker recorder did not start: no API key; log in first"


def test_an_unknown_tracker_lists_those_that_are_known():
    with pytest.raises(UnavailableError, match=r"no tracker 'tensorbord'; it is none, or some of: aim, .*tensorboard"):
        check_trackers(["tensorboard", "tensorbord"])


@pytest.mark.parametrize(("name", "package"), [("mlflow", "mlflow"), ("comet_ml", "comet-ml")])
def test_a_tracker_without_its_package_says_how_to_get_it(tmp_path, monkeypatch, name, package):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    said = rf"the tracker {name} is not installed \(there is: tensorboard\); run: pip install {package}$"
    with pytest.raises(UnavailableError, match=said):
        check_trackers([name])
    with pytest.raises(UnavailableError, match=said):
        open_trackers(["tensorboard", name], tmp_path, "swin", {})
    assert list(tmp_path.iterdir()) == []


def test_the_default_is_at_hand():
    check_trackers(["tensorboard"])
    check_trackers(["none"])
