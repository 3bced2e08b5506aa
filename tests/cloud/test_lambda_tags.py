"""Ray's tags survive the API's alphabet and the end of a process."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from ray.autoscaler import tags as ray_tags

from nanochat_ray.cloud import lambda_tags
from nanochat_ray.cloud.lambda_tags import LaterTags, decode, encode
from tests.cloud import api_facts

TAG = api_facts.load()["components"]["schemas"]["RequestedTagEntry"]["properties"]
KEYS = [value for name, value in vars(ray_tags).items() if name.startswith("TAG_")]
texts = st.text(st.characters(codec="utf-8"), max_size=300)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS) | texts | st.just("nr:tag-0:0"), texts, max_size=8))
def test_all_tags_fit_and_come_back(tags):
    entries = encode(tags)
    for each in entries:
        assert re.search(TAG["key"]["pattern"], each["key"]) and len(each["key"]) <= TAG["key"]["maxLength"]
        assert len(each["value"]) <= TAG["value"]["maxLength"]
    assert len({each["key"] for each in entries}) == len(entries)
    assert decode({each["key"]: each["value"] for each in entries}) == tags


def test_rays_own_tags_stay_readable():
    tags = {key: "worker" for key in KEYS}
    assert encode(tags) == [{"key": key, "value": "worker"} for key in KEYS]


def test_torn_pieces_are_left_out():
    entries = {each["key"]: each["value"] for each in encode({"Big Key": "x" * 400, "a-tag": "b"})}
    del entries["nr:tag-0:1"]
    assert decode({**entries, "nr:launch": "t"}) == {"a-tag": "b"}


def test_later_tags_outlive_the_process_and_not_the_instance(tmp_path):
    LaterTags(tmp_path, "a/b c").set("n1", {"ray-node-status": "setting-up", "x": "1"}, ["n2"])
    LaterTags(tmp_path, "a/b c").set("n2", {"x": "2"}, ["n1"])
    again = LaterTags(tmp_path, "a/b c")
    assert again.of("n1") == {"ray-node-status": "setting-up", "x": "1"} and again.of("n2") == {"x": "2"}
    assert LaterTags(tmp_path, "other").of("n1") == {}
    again.set("n2", {"x": "3"}, [])
    assert LaterTags(tmp_path, "a/b c").of("n1") == {} and LaterTags(tmp_path, "a/b c").of("n2") == {"x": "3"}


def test_two_processes_do_not_undo_each_other(tmp_path):
    one, two = LaterTags(tmp_path, "c"), LaterTags(tmp_path, "c")
    one.set("n1", {"x": "1"}, ["n2"])
    two.set("n2", {"x": "2"}, ["n1"])
    assert LaterTags(tmp_path, "c").of("n1") == {"x": "1"} and LaterTags(tmp_path, "c").of("n2") == {"x": "2"}


def test_a_torn_file_and_a_full_disk_are_borne(tmp_path, monkeypatch, caplog):
    tags = LaterTags(tmp_path, "c")
    tags.set("n1", {"x": "1"}, [])
    next(tmp_path.glob("*.json")).write_text('{"n1": ')
    assert LaterTags(tmp_path, "c").of("n1") == {}
    monkeypatch.setattr(lambda_tags, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    for n in range(3):
        tags.set("n1", {"x": str(n)}, [])
    assert tags.of("n1") == {"x": "2"} and caplog.text.count("cannot be kept") == 1
