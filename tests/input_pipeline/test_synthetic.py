"""Synthetic scenes: what happens in them, what is seen and heard, the files written, and what one modality
can guess."""

from __future__ import annotations

import dataclasses
import json

import av
import numpy as np
import pytest

from input_pipeline.errors import UserError
from input_pipeline.manifest import parse_lines, read_manifest
from input_pipeline.synthetic import generate, render, solver, sounds
from input_pipeline.synthetic.annotate import annotate, check, manifest_lines
from input_pipeline.synthetic.questions import Question, make_questions
from input_pipeline.synthetic.scene import MOTIONS, SHAPES, SOUNDS, Event, Figure, Scene, make_scene

SCENES = [make_scene(seed) for seed in range(200)]
PICTURE_SIZE = 64


def overlaps(scene: Scene) -> list[tuple[Event, Event]]:
    events = scene.events
    return [(a, b) for i, a in enumerate(events) for b in events[i + 1 :] if b.start < a.end]


def one_event(figure: Figure | None, motion: str | None, sound: str | None, seed: int = 3) -> Scene:
    return Scene("one", seed, 10.0, (Event(2.0, 5.0, figure, motion, sound),), props=0)


def colourfulness(picture: np.ndarray) -> np.ndarray:
    """Distance between a pixel's largest and smallest channel: [h w]; small on greys and on the
    background."""
    return picture.max(axis=-1).astype(int) - picture.min(axis=-1)


# What happens


def test_same_seed_same_scene_other_seed_another():
    assert make_scene(7) == make_scene(7)
    assert len({scene.events for scene in SCENES}) == len(SCENES)


def test_every_scene_has_pairs_pauses_distractors_and_an_overlap():
    for scene in SCENES:
        events = scene.events
        assert 10.0 <= scene.duration <= 240.0
        assert sum(e.figure is not None and e.sound is not None for e in events) >= 3
        assert any(e.sound is None for e in events) and any(e.figure is None for e in events)
        assert len(overlaps(scene)) == 1
        first, second = overlaps(scene)[0]
        assert first.figure is None or first.figure != second.figure
        assert first.sound is None or first.sound != second.sound
        pauses = sum(b.start > a.end for a, b in zip(events, events[1:], strict=False))
        assert pauses == len(events) - 2
        assert 0 < events[0].start and max(e.end for e in events) <= scene.duration
        assert list(events) == sorted(events, key=lambda e: e.start)


def test_durations_span_seconds_to_minutes():
    durations = np.array([scene.duration for scene in SCENES])
    assert durations.min() < 20 and durations.max() > 180 and 30 < np.median(durations) < 80


# What is seen


def test_frames_are_deterministic_and_pauses_show_nothing_coloured():
    for scene in SCENES[:15]:
        times = scene.moment_times()
        for time in times:
            picture = render.render_frame(scene, time, PICTURE_SIZE)
            assert picture.shape == (PICTURE_SIZE, PICTURE_SIZE, 3) and picture.dtype == np.uint8
            shown = scene.seen_at(time)
            if shown is None:
                assert not render.visual_state(scene, time) and colourfulness(picture).max() < 60
            else:
                color = np.array(render.RGB[str(shown.figure.color)])
                near = (np.abs(picture.astype(int) - color).max(axis=-1) < 12).mean()
                assert 0.015 < near < 0.12, f"{shown.figure}: {near:.3f} of the picture"
    scene = SCENES[0]
    before = render.render_frame(scene, scene.events[0].start + 0.1, 48)
    render._background.cache_clear()
    assert np.array_equal(before, render.render_frame(scene, scene.events[0].start + 0.1, 48))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("done", [0.02, 0.5, 0.98])
def test_one_frame_tells_the_motion_by_its_trail(shape, done):
    seen = {}
    for motion in MOTIONS:
        scene = one_event(Figure("yellow", shape), motion, None)
        with_figure = render.render_frame(scene, 2.0 + 3.0 * done, PICTURE_SIZE).astype(float)
        change = np.abs(with_figure - render.render_frame(scene, 0.0, PICTURE_SIZE)).sum(axis=-1)
        stamp = render.visual_state(scene, 2.0 + 3.0 * done)[0]
        x, y = (c * PICTURE_SIZE for c in stamp.center)
        r = stamp.diameter * PICTURE_SIZE / 2
        rows, columns = np.mgrid[:PICTURE_SIZE, :PICTURE_SIZE] + 0.5
        seen[motion] = {
            "below": change[rows > y + 1.2 * r].sum(),
            "above": change[rows < y - 1.2 * r].sum(),
            "left": change[columns < x - 1.2 * r].sum(),
            "right": change[columns > x + 1.2 * r].sum(),
        }
    trails = {"rises": {"below"}, "falls": {"above"}, "slides": {"left"}, "shakes": {"left", "right"}}
    for motion, sides in seen.items():
        assert {side for side, amount in sides.items() if amount > 200} == trails[motion], (motion, sides)


def test_motions_go_their_way():
    ends = {}
    for motion in MOTIONS:
        scene = one_event(Figure("red", "circle"), motion, None)
        ends[motion] = [render.visual_state(scene, t)[0].center for t in (2.0, 4.99)]
    assert ends["rises"][1][1] < ends["rises"][0][1] - 0.4 and ends["falls"][1][1] > ends["falls"][0][1] + 0.4
    assert ends["slides"][1][0] > ends["slides"][0][0] + 0.4
    assert abs(ends["shakes"][1][0] - ends["shakes"][0][0]) < 0.11


def test_in_an_overlap_the_earlier_figure_fades_behind_the_later():
    scene = next(s for s in SCENES if all(e.figure for e in overlaps(s)[0]))
    first, second = overlaps(scene)[0]
    back, front = render.visual_state(scene, (second.start + min(first.end, second.end)) / 2)
    assert (back.figure, back.opacity) == (first.figure, render.FADED)
    assert (front.figure, front.opacity) == (second.figure, 1.0)


def test_grey_props_do_not_move():
    scene = next(s for s in SCENES if s.props == 2)
    bare = dataclasses.replace(scene, props=0)
    assert np.array_equal(render.render_frame(scene, 0.0, 96), render.render_frame(scene, scene.duration, 96))
    assert (render.render_frame(scene, 0.0, 96) != render.render_frame(bare, 0.0, 96)).any(
        axis=-1
    ).mean() > 0.02


# What is heard


def level(wave: np.ndarray) -> float:
    return 20 * np.log10(np.sqrt(np.mean(np.square(wave))))


def test_sound_is_deterministic_loud_in_events_and_quiet_in_pauses():
    for scene in SCENES[:25]:
        if scene.duration > 60:
            continue
        wave = sounds.synthesize(scene)
        assert wave.dtype == np.float32 and wave.shape == (round(scene.duration * 16_000),)
        assert np.abs(wave).max() <= 0.5
        assert np.array_equal(wave, sounds.synthesize(scene))
        silent = np.ones(len(wave), bool)
        for event in scene.events:
            if event.sound:
                a, b = round(event.start * 16_000), round(event.end * 16_000)
                silent[a:b] = False
                assert level(wave[a:b]) > -38, event.sound  # Clicks are mostly pauses.
        assert -51 < level(wave[silent]) < -49


def test_in_an_overlap_the_earlier_sound_is_twelve_decibels_lower():
    figures = (Figure("red", "ring"), Figure("blue", "star"))
    first = Event(1.0, 5.0, figures[0], "rises", "whistle")
    second = Event(4.0, 8.0, figures[1], "falls", "buzz")
    alone = sounds.synthesize(Scene("a", 5, 10.0, (first,), 0))
    both = sounds.synthesize(Scene("b", 5, 10.0, (first, second), 0))

    def whistle(wave: np.ndarray, start: float, end: float) -> float:
        """Energy around 2.2 kHz, where the sawtooth of 120 Hz is weak."""
        spectrum = np.abs(np.fft.rfft(wave[round(start * 16_000) : round(end * 16_000)])) ** 2
        hertz = np.linspace(0, 8000, len(spectrum))
        return 10 * np.log10(spectrum[(hertz > 2000) & (hertz < 2450)].sum())

    assert np.array_equal(alone[: 4 * 16_000], both[: 4 * 16_000])
    assert whistle(alone, 4.2, 4.9) - whistle(both, 4.2, 4.9) == pytest.approx(12, abs=2)


def fingerprint(wave: np.ndarray) -> np.ndarray:
    """Mean and spread over time of 24 log bands: what any half second of a timbre looks like."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, 400)[::160] * np.hanning(400)
    power = np.abs(np.fft.rfft(frames, axis=-1)) ** 2
    bands = np.stack([p.mean(axis=-1) for p in np.array_split(power[:, 1:], 24, axis=-1)], axis=-1)
    logs = np.log(bands + 1e-5)
    return np.concatenate([logs.mean(axis=0), 2 * logs.std(axis=0)])


def test_any_half_second_of_a_sound_tells_which_it_is():
    def crops(name: str, seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        wave = sounds.render_sound(name, 4.0, rng)
        return [fingerprint(wave[s : s + 8000]) for s in rng.integers(0, len(wave) - 8000, size=5)]

    known = {name: np.mean([c for seed in range(4) for c in crops(name, seed)], axis=0) for name in SOUNDS}
    for name in SOUNDS:
        for crop in [c for seed in range(10, 14) for c in crops(name, seed)]:
            assert min(known, key=lambda other: np.abs(known[other] - crop).sum()) == name


def test_unknown_sound_is_named():
    with pytest.raises(ValueError, match="unknown sound 'moo'"):
        sounds.render_sound("moo", 1.0, np.random.default_rng(0))


# Files


@pytest.mark.parametrize(("seconds", "fps"), [(10.0, 8), (150.0, 3)])
def test_video_has_both_streams_the_right_duration_and_the_drawn_frames(tmp_path, seconds, fps):
    scene, _ = generate.draw_scene(1, shortest=seconds, longest=seconds + 0.5)
    path = tmp_path / "a.mp4"
    generate.write_video(scene, path, size=32)
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (audio.codec_context.name, audio.codec_context.sample_rate) == ("aac", 16_000)
        assert video.average_rate == fps == render.frame_rate(scene.duration)
        assert float(video.duration * video.time_base) == pytest.approx(scene.duration, abs=1 / fps)
        frames = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video)]
    for time, picture in frames[:: len(frames) // 10]:
        drawn = render.render_frame(scene, time, 32)
        assert np.abs(picture.astype(int) - drawn).mean() < 12
    with av.open(str(path)) as container:
        heard = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    wave = sounds.synthesize(scene)
    assert len(heard) == pytest.approx(len(wave), abs=2048)
    n = min(len(heard), len(wave), 160_000)
    assert np.corrcoef(heard[:n], wave[:n])[0, 1] > 0.98  # In time to the sample, or tones would not agree.
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_odd_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="even number"):
        generate.write_video(SCENES[0], tmp_path / "a.mp4", size=33)


def test_generate_gives_the_same_files_whatever_the_workers(tmp_path):
    options = {"size": 32, "fps": 4, "shortest": 5.0, "longest": 7.0}
    manifests = [generate.generate(tmp_path / str(w), 3, 5, workers=w, **options) for w in (1, 2)]
    names = sorted(p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*") if p.is_file())
    assert [str(n) for n in names if n.suffix == ".mp4"] == [f"videos/s5-0000{i}.mp4" for i in range(3)]
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    listing = read_manifest(manifests[0])
    assert not listing.rejections and len({line.path for line in listing.lines}) == 3
    rows = json.loads((tmp_path / "1" / "annotations.json").read_text())
    assert [row["video_id"] for row in rows] == ["s5-00000", "s5-00001", "s5-00002"]
    assert len({row["duration"] for row in rows}) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"shortest": 9.0, "longest": 8.0}, "durations"),
    ],
)
def test_generate_refuses_what_it_cannot_do(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        generate.generate(tmp_path, **{"count": 1, "seed": 0, **changed})


# Annotations and manifest


def test_annotation_has_the_form_and_passes_its_checks():
    for seed in range(60):
        scene, questions = generate.draw_scene(seed)
        row = annotate(scene, questions)
        assert set(row) == {"video_id", "source", "duration", "fps", "clips", "captions", "qa"}
        assert json.loads(json.dumps(row)) == row
        assert len(row["clips"]) >= 3
        for clip, after in zip(row["clips"], row["clips"][1:] + [None], strict=True):
            assert set(clip) == {"start", "end", "visual", "audio", "av"}
            assert 0 <= clip["start"] < clip["end"] <= scene.duration
            assert after is None or clip["end"] < after["start"]
        assert set(row["captions"]) == {"visual", "audio", "av"}
        assert "nothing" not in row["captions"]["visual"] and "silence" not in row["captions"]["audio"]
        assert [qa["type"] for qa in row["qa"]] == [1, 2, 3, 4, 5]
        for qa, question in zip(row["qa"], questions, strict=True):
            assert set(qa) == {"id", "type", "question", "options", "answer", "checks"}
            assert len(qa["options"]) == 4 and qa["answer"] in "ABCD" and all(qa["checks"].values()), qa
            assert qa["options"]["ABCD".index(qa["answer"])] == question.options[question.answer]


@pytest.mark.parametrize(
    ("failed", "question"),
    [
        ("distinct_options", Question(1, "What is heard?", ("bell", "drum", "Bell", "buzz"), 0)),
        ("stem_time", Question(3, "What is heard?", ("bell", "drum", "hiss", "buzz"), 0)),
        ("stem_time", Question(1, "What is heard at 00:00:03.000?", ("bell", "drum", "hiss", "buzz"), 0)),
        (
            "times_in_video",
            Question(3, "What is heard at 00:00:33.000?", ("bell", "drum", "hiss", "buzz"), 0),
        ),
        (
            "option_times",
            Question(5, "When?", ("00:01 - 00:02", "00:03 - 00:04", "00:05 - 00:06", "soon"), 0),
        ),
        ("option_times", Question(1, "What?", ("at 00:01", "drum", "hiss", "buzz"), 0)),
        ("no_shared_words", Question(1, "Is it so: a b c d e f?", ("yes, a b c d e f", "b", "c", "d"), 0)),
    ],
)
def test_each_check_can_fail_alone(failed, question):
    assert [name for name, passed in check(question, duration=10.0).items() if not passed] == [failed]


def test_manifest_lines_are_legal_and_hold_every_task():
    for seed in range(40):
        scene, questions = generate.draw_scene(seed)
        lines = manifest_lines(scene, questions, "videos/a.mp4")
        assert lines == manifest_lines(scene, questions, "videos/a.mp4")
        listing = parse_lines(lines)
        assert not listing.rejections and {line.kind for line in listing.lines} == {"video"}
        assert len({line["id"] for line in lines}) == len(lines)
        tasks = [line["task"] for line in lines]
        counts = {task: tasks.count(task) for task in tasks}
        extra = counts.pop("mcq_extra")
        assert counts.pop("open_qa") in (4, 5, 6) and 2 <= extra <= 20
        assert counts == {"visual_caption": 1, "audio_caption": 1, "av_pairs": 2, "av_caption": 3, "mcq": 5}
        asked = [line["conversations"][0]["value"] for line in lines]
        assert len(set(asked)) == len(asked)
        for line in lines:
            question, reply = (turn["value"] for turn in line["conversations"])
            assert question.startswith("<video>\n")
            if line["task"].startswith("mcq"):
                right = line["options"]["ABCD".index(line["answer"])]
                assert line["qa_type"] in (1, 2, 3, 4, 5) and f"{line['answer']}: {right}" in question
                assert reply == (line["answer"] if line["qa_type"] == 5 else right)


def test_captions_tell_the_events_in_order():
    for seed in range(20):
        scene, questions = generate.draw_scene(seed)
        lines = {line["task"]: line for line in manifest_lines(scene, questions, "a.mp4")}
        told = lines["audio_caption"]["conversations"][1]["value"].split(", ")
        heard = [e.sound for e in scene.events if e.sound]
        assert told == [s for i, s in enumerate(heard) if i == 0 or s != heard[i - 1]]
        seen = lines["visual_caption"]["conversations"][1]["value"].split(", ")
        moved = [f"{e.figure} {e.motion}" for e in scene.events if e.figure]
        assert seen == [m for i, m in enumerate(moved) if i == 0 or m != moved[i - 1]]
        pairs = lines["av_pairs"]["conversations"][1]["value"].split(", ")
        both = {f"{e.sound} {e.figure}" for e in scene.events if e.figure and e.sound}
        assert set(pairs) <= both and len(pairs) == 2  # The sound that comes twice has no single partner.


# What one modality can guess


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, list[Question]]]:
    return [generate.draw_scene(seed) for seed in range(3000)]


def test_no_single_modality_answers_the_questions(asked, capsys):
    rates = solver.guess_rates(asked)
    with capsys.disabled():
        print()
        for modality, rate in rates.items():
            print(f"  {modality} alone: {rate}")
    assert set(rates) == {"text", "picture", "sound"}
    for modality, rate in rates.items():
        assert rate.n == 5 * len(asked) / 2
        assert 0.22 < rate.overall < 0.40, f"{modality}: {rate}"


def test_both_modalities_answer_every_question(asked):
    for scene, questions in asked:
        for question in questions:
            assert solver.answer(scene, question) == question.answer


def test_the_guesser_finds_a_leak_in_the_text(asked):
    leaking = [(s, [_right_first(q) if s.seed % 2 else q for q in qs[:1]]) for s, qs in asked[:600]]
    assert solver.guess_rates(leaking)["text"].overall > 0.5


def _right_first(question: Question) -> Question:
    right = question.options[question.answer]
    a, b, c = (o for o in question.options if o != right)
    return dataclasses.replace(question, options=(right, a, b, c), answer=0)


@pytest.mark.parametrize(("modality", "kind"), [("picture", 2), ("sound", 1)])
def test_the_guesser_finds_a_leak_in_the_timeline(asked, modality, kind):
    """Of questions whose answer comes first in its video the order of events tells the answer."""
    leaking = []
    for scene, questions in asked:
        first = solver.view(scene, modality)[0].key
        leaking.append((scene, [q for q in questions if q.type == kind and q.options[q.answer] == first]))
    leaking = [pair for pair in leaking if pair[1]]
    rates = solver.guess_rates(leaking)
    assert len(leaking) > 200 and rates[modality].overall > 0.9 and rates["text"].overall < 0.4


def test_questions_with_no_or_several_answers_are_found_out():
    scene, questions = generate.draw_scene(0)
    question = questions[0]
    wrong = tuple(o if i != question.answer else "moo" for i, o in enumerate(question.options))
    with pytest.raises(ValueError, match="0 options fit"):
        solver.answer(scene, dataclasses.replace(question, options=wrong))
    ranged = questions[2]
    timeless = dataclasses.replace(ranged, stem=ranged.stem.partition(", ")[2].capitalize(), type=1)
    with pytest.raises(ValueError, match="2 options fit"):  # Only the time makes it unique.
        solver.answer(scene, timeless)


def test_questions_depend_on_their_seed():
    scene, questions = generate.draw_scene(0)
    assert make_questions(scene) == questions
    assert any(make_questions(scene, seed=s) != questions for s in (1, 2))
