"""Messages of the world-model service: what is accepted, what is refused and how, and that pixels survive."""

from __future__ import annotations

import base64
import io
import json
import uuid
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from physisforcing.core.errors import MissingCapabilityError
from physisforcing.core.types import DT, ActionSpec, Rollout, ViewLayout, WorldModelSpec
from physisforcing.planner.service.answers import AnswerStore
from physisforcing.planner.service.client import spec_of
from physisforcing.planner.service.faults import CODES, ServiceFault
from physisforcing.planner.service.limits import ServiceLimits
from physisforcing.planner.service.offers import capabilities_of, model_version, offers_of
from physisforcing.planner.service.pictures import decode_png, encode_png
from physisforcing.planner.service.schema import Capabilities, ErrorBody, PredictResponse
from physisforcing.planner.service.toy import ToyWorldModel, text
from physisforcing.planner.service.translate import answer, prepare

LIMITS = ServiceLimits()
MODEL, TEXT = ToyWorldModel(), text()
OFFERS = offers_of(MODEL.spec, 14)
PICTURE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def request(count: int = 1, model: ToyWorldModel = MODEL) -> dict:
    image = {"encoding": "png_base64", "color_space": "RGB", "height": 24, "width": 32, "channels": 3}
    context = {"frames": [{**image, "data": encode_png(PICTURE)}], "actions": [], "states": [[0.5] * 28]}
    context["instruction"] = "click the bell"
    sample = {"seed": 7, "context": context}
    sample |= {"actions": [[0.25] * 28] * 4} if model is MODEL else {"horizon": 5}
    return {
        "api_version": "1.0",
        "request_id": str(uuid.UUID(int=1)),
        "model_version": model_version(model.spec),
        "profile_id": "actions-4" if model is MODEL else "text-5",
        "samples": [{"sample_id": f"s{i}", **sample} for i in range(count)],
    }


def refused(value: object, spec: WorldModelSpec = MODEL.spec, limits: ServiceLimits = LIMITS) -> ServiceFault:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    with pytest.raises(ServiceFault) as caught:
        prepare(body, spec, offers_of(spec, 14), limits)
    return caught.value


def test_pictures_come_back_as_they_were() -> None:
    assert np.array_equal(decode_png(encode_png(PICTURE), 24, 32), PICTURE)


def test_interlaced_pictures_and_pictures_with_metadata_are_read() -> None:
    file = io.BytesIO()
    info = Image.new("RGB", (5, 3))  # smaller than one Adam7 tile: some passes are empty
    info.putdata([(i, 2 * i, 255 - i) for i in range(15)])
    info.save(file, format="PNG", dpi=(300, 300), icc_profile=b"x" * 500)
    plain = decode_png(base64.b64encode(file.getvalue()).decode(), 3, 5)
    assert np.array_equal(plain, np.asarray(info))
    adam7 = _interlaced(plain)
    assert np.array_equal(decode_png(base64.b64encode(adam7).decode(), 3, 5), plain)


def _interlaced(picture: np.ndarray) -> bytes:
    """An Adam7 PNG without filters, written from the format's description."""
    import struct
    import zlib

    raw = b""
    for top, left, down, right in (
        (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1),
    ):  # fmt: skip
        part = picture[top::down, left::right]
        if part.size:
            raw += b"".join(b"\0" + row.tobytes() for row in part)
    height, width = picture.shape[:2]
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    ]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_request_becomes_a_rollout_request() -> None:
    prepared = prepare(json.dumps(request(count=2)).encode(), MODEL.spec, OFFERS, LIMITS)
    rollout = prepared.rollout
    assert rollout.context_BVTHWC.shape == (2, 1, 1, 24, 32, 3) and np.array_equal(
        rollout.context_BVTHWC[1, 0, 0], PICTURE
    )
    assert rollout.actions_BSPA is not None and rollout.actions_BSPA.shape == (2, 1, 8, 14)
    assert rollout.proprioception_BKA is not None and rollout.proprioception_BKA.shape == (2, 2, 14)
    assert rollout.horizon == 5 and rollout.seeds_BS.tolist() == [[7], [7]]
    assert prepared.sample_ids == ["s0", "s1"]
    rows = request()
    rows["samples"][0]["actions"][1] = [float(i) for i in range(28)]
    actions = prepare(json.dumps(rows).encode(), MODEL.spec, OFFERS, LIMITS).rollout.actions_BSPA
    assert actions is not None and actions[0, 0, 2].tolist() == list(range(14))  # the second frame's first control step
    assert actions[0, 0, 3].tolist() == list(range(14, 28))


def test_the_digest_is_of_the_value_and_not_of_the_bytes() -> None:
    def digest(value: object, **style: object) -> bytes:
        return prepare(json.dumps(value, **style).encode(), MODEL.spec, OFFERS, LIMITS).digest  # type: ignore[arg-type]

    plain = digest(request())
    assert digest(dict(reversed(request().items())), indent=3) == plain
    changed = request()
    changed["samples"][0]["seed"] = 8
    assert digest(changed) != plain and digest(request() | {"later": 1}) != plain


def test_an_answer_has_one_frame_an_action_or_the_horizon() -> None:
    for model, frames in ((MODEL, 4), (TEXT, 5)):
        prepared = prepare(json.dumps(request(model=model)).encode(), model.spec, offers_of(model.spec, 14), LIMITS)
        rollout = model.rollout(prepared.rollout)
        assert rollout.frames_BSVTHWC is not None
        found = PredictResponse.model_validate_json(answer(prepared, rollout, model.spec))
        pictures = [decode_png(image.data, 24, 32) for image in found.predictions[0].frames]
        assert np.array_equal(np.stack(pictures), rollout.frames_BSVTHWC[0, 0, 0, 5 - frames :])
        assert found.diagnostics is not None and (found.diagnostics.first_frames is None) == (frames == 5)


def test_a_model_that_breaks_its_promise_is_an_internal_error() -> None:
    prepared = prepare(json.dumps(request()).encode(), MODEL.spec, OFFERS, LIMITS)
    rollout = MODEL.rollout(prepared.rollout)
    assert rollout.frames_BSVTHWC is not None
    for frames in (rollout.frames_BSVTHWC[:, :, :, 1:], rollout.frames_BSVTHWC.astype(np.float32), None):
        with pytest.raises(RuntimeError, match="promised"):
            answer(prepared, Rollout(times_T=rollout.times_T, frames_BSVTHWC=frames), MODEL.spec)


def test_refusals_name_the_field_and_never_its_value() -> None:
    wrong = request()
    wrong["samples"][0]["actions"][2] = [0.0] * 27
    fault = refused(wrong)
    assert (fault.status, fault.code, fault.retryable) == (400, "INVALID_ARGUMENT", False)
    assert fault.message == "samples[0].actions[2]: 27 numbers, wanted 28"
    assert fault.request_id == wrong["request_id"]
    wrong = request()
    wrong["samples"][0]["seed"] = "SECRET"
    fault = refused(wrong)
    assert fault.message.startswith("samples[0].seed: ") and "SECRET" not in fault.message
    assert ErrorBody.model_validate_json(fault.body()).error.code == "INVALID_ARGUMENT"
    assert refused(b"{").request_id is None


def test_versions_come_before_everything_else() -> None:
    assert refused({"api_version": "2.0"}).code == "UNSUPPORTED_VERSION"
    for name in ("model_version", "profile_id"):
        fault = refused(request() | {name: "other"})
        assert (fault.status, fault.code) == (422, "UNSUPPORTED_VERSION") and fault.message.startswith(name)


def test_a_text_model_needs_actions() -> None:
    for profile in ("text-5", "official-profile"):
        wanted = request() | {"model_version": model_version(TEXT.spec), "profile_id": profile}
        fault = refused(wanted, TEXT.spec)
        assert (fault.status, fault.code, fault.needs) == (422, "MISSING_CAPABILITY", "actions")
        assert json.loads(fault.body())["error"]["needs"] == "actions"


def test_an_instruction_is_needed_where_it_drives() -> None:
    for instruction in (None, "", "  "):
        silent = request(model=TEXT)
        silent["samples"][0]["context"]["instruction"] = instruction
        assert "instruction" in refused(silent, TEXT.spec).message
    silent = request()
    del silent["samples"][0]["context"]["instruction"]
    assert prepare(json.dumps(silent).encode(), MODEL.spec, OFFERS, LIMITS).rollout.instructions == [""]
    long = request()
    long["samples"][0]["context"]["instruction"] = "a" * 1001
    assert "1001 characters" in refused(long).message


def test_many_values_are_refused_before_they_are_built() -> None:
    body = b'{"later": [' + b"[]," * 200_000 + b"[]]}"
    assert "commas and brackets" in refused(body).message
    assert refused(b'{"later": ' + b"9" * 4200 + b"}").code == "INVALID_ARGUMENT"
    valid = json.dumps(request()).encode()
    assert refused(valid[:-1] + b', "later": ' + b"9" * 4305 + b"}").code == "INVALID_ARGUMENT"


def test_the_manifest_and_back() -> None:
    limits = replace(LIMITS, max_batch_size=4)
    manifest = capabilities_of(MODEL.spec, OFFERS, limits)
    again = Capabilities.model_validate_json(manifest.model_dump_json())
    assert again == manifest and [p.profile_id for p in again.profiles] == ["actions-4"]
    assert spec_of(again) == replace(MODEL.spec, max_batch=4)
    tiles = replace(
        TEXT.spec,
        deterministic=False,
        views=ViewLayout(names=("a", "b"), height=24, width=32, tiles=((0, 0, 24, 16), (0, 16, 24, 16))),
    )
    manifest = capabilities_of(tiles, offers_of(tiles, 14), limits)
    found = spec_of(Capabilities.model_validate_json(manifest.model_dump_json()))
    assert found == replace(tiles, max_batch=4)


def test_a_manifest_that_says_no_more_than_v1() -> None:
    profile = {
        "profile_id": "official-profile",
        "image": {"encoding": "png_base64", "color_space": "RGB", "height": 256, "width": 256, "channels": 3},
        "context_frames": {"min": 1, "max": 8},
        "prediction_frames": {"min": 1, "max": 16},
        "action": {"dtype": "float32", "dimension": 14, "representation": "profile_canonical"},
        "state": {"supported": False, "dimension": None},
        "instruction": {"supported": True},
    }
    value = {
        "api_version": "1.0",
        "model_version": "wm-2026",
        "profiles": [profile],
        "limits": {
            "max_batch_size": 8,
            "max_request_bytes": 2**25,
            "max_concurrency": 2,
            "recommended_timeout_ms": 600000,
        },
        "determinism": {"seed_supported": True, "same_seed_same_pixels": True},
    }
    spec = spec_of(Capabilities.model_validate_json(json.dumps(value)), frame_dt=DT)
    assert spec.horizons == tuple(range(2, 18)) and spec.conditions == {"actions", "text"} and spec.max_batch == 8
    assert spec.action_spec is not None and spec.action_spec.dim == 14 and spec.action_spec.high == (np.inf,) * 14
    profile["context_frames"]["min"] = 5
    with pytest.raises(MissingCapabilityError, match="one frame"):
        spec_of(Capabilities.model_validate_json(json.dumps(value)))


def test_models_that_the_contract_cannot_carry() -> None:
    two = replace(MODEL.spec, views=ViewLayout(names=("head", "wrist"), height=24, width=32))
    for spec in (two, replace(MODEL.spec, returns=frozenset({"latents"}))):
        with pytest.raises(MissingCapabilityError, match="one picture a frame"):
            offers_of(spec, 14)
    slow = ActionSpec(names=("a",), low=(0.0,), high=(1.0,), dt=0.05)
    with pytest.raises(ValueError, match="whole number of actions"):
        offers_of(replace(MODEL.spec, action_spec=slow), 14)


def test_the_table_of_codes_is_the_contracts() -> None:
    v1 = {"INVALID_ARGUMENT": 400, "UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403, "REQUEST_ID_CONFLICT": 409}
    v1 |= {"PAYLOAD_TOO_LARGE": 413, "UNSUPPORTED_VERSION": 422, "OVERLOADED": 429, "INTERNAL": 500}
    v1 |= {"NOT_READY": 503, "DEADLINE_EXCEEDED": 504}
    assert {name: CODES[name][0] for name in v1} == v1
    assert {name for name, (status, retry) in CODES.items() if retry} == {name for name, s in v1.items() if s >= 429}


class TestAnswers:
    """What is remembered for retries."""

    def store(self, **options: object) -> tuple[AnswerStore, list[float]]:
        now = [0.0]
        settings = {"bytes_": 100, "ttl_s": 10.0, "ids": 5} | options
        return AnswerStore(clock=lambda: now[0], **settings), now  # type: ignore[arg-type]

    def test_the_same_payload_gets_the_stored_answer(self) -> None:
        store, _ = self.store()
        entry, _, mine = store.claim("a", b"1")
        assert mine
        _, waiting, mine = store.claim("a", b"1")  # while it is computed
        assert not mine and not waiting.done()
        store.finish(entry, b"answer")
        assert waiting.result(0) == b"answer"
        assert store.claim("a", b"1")[1].result(0) == b"answer"

    def test_another_payload_is_a_conflict_also_while_the_first_is_computed(self) -> None:
        store, _ = self.store()
        entry, _, _ = store.claim("a", b"1")
        for _ in range(2):
            with pytest.raises(ServiceFault) as caught:
                store.claim("a", b"2")
            assert (caught.value.status, caught.value.request_id) == (409, "a")
            if entry.done is None:
                store.finish(entry, b"answer")

    def test_what_failed_is_forgotten_and_those_who_wait_hear_of_it(self) -> None:
        store, _ = self.store()
        entry, _, _ = store.claim("a", b"1")
        _, waiting, _ = store.claim("a", b"1")
        store.fail(entry, ServiceFault("INTERNAL", "no"))
        with pytest.raises(ServiceFault, match="no"):
            waiting.result(0)
        assert store.claim("a", b"2")[2] and len(store) == 1

    def test_it_is_bounded_in_time_number_and_bytes(self) -> None:
        store, now = self.store()
        for i in range(3):
            store.finish(store.claim(f"a{i}", b"1")[0], bytes(40))
        assert store.stored_bytes == 80 and len(store) == 3
        assert store.claim("a0", b"1")[2]  # its bytes are gone: compute again
        with pytest.raises(ServiceFault):
            store.claim("a0", b"2")  # but its id still stands for its payload
        for i in range(3, 20):
            store.finish(store.claim(f"a{i}", b"1")[0], bytes(40))
        assert len(store) <= 6 and store.stored_bytes <= 100
        now[0] = 11.0
        assert store.claim("a19", b"2")[2] and store.stored_bytes == 0

    def test_an_answer_larger_than_all_space_is_given_and_not_kept(self) -> None:
        store, _ = self.store()
        entry, future, _ = store.claim("a", b"1")
        store.finish(entry, bytes(1000))
        assert len(future.result(0)) == 1000 and store.stored_bytes == 0
