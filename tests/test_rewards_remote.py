"""The remote reward against a real HTTP server on this machine that answers well, late, badly, or not at all."""

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from jaxrl.rewards import Sample, Score, make_scorer


class Service:
    """An HTTP reward service; `answer(samples, number_of_the_request)` gives status and body, or sleeps first."""

    def __init__(self, answer):
        self.requests: list[list[dict]] = []
        self.headers: list[dict[str, str]] = []
        lock = threading.Lock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                samples = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["samples"]
                with lock:
                    service.requests.append(samples)
                    service.headers.append(dict(self.headers))
                    number = len(service.requests)
                status, body = answer(samples, number)
                try:
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())
                except BrokenPipeError:
                    pass  # the client gave up waiting

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/score"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve():
    services = []

    def start(answer):
        services.append(Service(answer))
        return services[-1]

    yield start
    for service in services:
        service.close()


def samples_with(*responses):
    return [Sample("a question", text, "truth", "test", {"n": np.int64(1)}, len(text), True) for text in responses]


def lengths(samples, number):
    return 200, {"scores": [len(sample["response"]) / 4 for sample in samples]}


def score(url, samples, **kwargs):
    with make_scorer([("remote", 1.0, {"url": url, "backoff_s": 0.01} | kwargs)], error_reward=-1.0) as scorer:
        return scorer(samples)


def test_a_remote_reward_sends_whole_samples_in_batches_and_keeps_their_order(serve):
    service = serve(lengths)
    scores = score(service.url, samples_with(*("x" * n for n in range(10))), batch_size=4, concurrency=3)
    assert scores == [Score(n / 4) for n in range(10)]
    assert sorted(len(batch) for batch in service.requests) == [2, 4, 4]
    assert service.requests[0][0].keys() == {
        "prompt", "response", "ground_truth", "data_source", "extra_info", "response_length", "finished", "messages"
    }  # fmt: skip
    assert service.requests[0][0]["extra_info"] == {"n": 1}


def test_remote_batches_are_under_way_at_the_same_time(serve):
    meeting = threading.Barrier(3, timeout=10.0)

    def answer(samples, number):
        meeting.wait()  # only three requests at once get past this
        return lengths(samples, number)

    assert score(serve(answer).url, samples_with("a", "b", "c"), batch_size=1, concurrency=3) == [Score(0.25)] * 3


def test_a_service_that_fails_twice_and_then_answers_costs_nothing(serve, caplog):
    service = serve(lambda samples, number: (503, "busy") if number < 3 else lengths(samples, number))
    with caplog.at_level(logging.WARNING, logger="jaxrl"):
        assert score(service.url, samples_with("four")) == [Score(1.0)]
    assert len(service.requests) == 3
    assert sum("trying again" in message for message in caplog.messages) == 2


def test_a_service_that_keeps_failing_is_an_error_after_the_last_retry(serve):
    service = serve(lambda samples, number: (500, "broken"))
    [failed] = score(service.url, samples_with("a"), retries=2)
    assert failed.reward == -1.0 and failed.error is not None and "500 Internal Server Error" in failed.error
    assert len(service.requests) == 3


def test_a_refused_request_is_not_sent_again(serve):
    service = serve(lambda samples, number: (401, "who are you?"))
    [failed] = score(service.url, samples_with("a"))
    assert failed.error is not None and "401" in failed.error
    assert len(service.requests) == 1


def test_a_service_that_hangs_times_out_and_leaves_other_batches_their_scores(serve):
    released = threading.Event()

    def answer(samples, number):
        if samples[0]["response"] == "hang":
            released.wait(20.0)
        return lengths(samples, number)

    start = time.monotonic()
    hung, answered = score(
        serve(answer).url, samples_with("hang", "four"), batch_size=1, timeout_s=1.0, retries=1, concurrency=2
    )
    released.set()
    assert time.monotonic() - start < 10.0
    assert hung.reward == -1.0 and hung.error is not None and "ReadTimeout" in hung.error
    assert answered == Score(1.0)


def test_a_service_that_is_not_there_is_an_error_of_its_samples():
    [failed] = score("http://127.0.0.1:9/score", samples_with("a"), retries=1)
    assert failed.error is not None and "http://127.0.0.1:9/score: ConnectError" in failed.error


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<html>hello</html>", "the service answered '<html>hello</html>', which is not JSON"),
        ({"score": [1.0]}, 'instead of {"scores": [..]}'),
        ([1.0, 2.0], 'instead of {"scores": [..]}'),
        ({"scores": [1.0]}, "the service answered 1 scores to 2 samples"),
    ],
)
def test_a_malformed_answer_is_a_clear_error_and_not_sent_again(body, reason, serve):
    service = serve(lambda samples, number: (200, body))
    for failed in score(service.url, samples_with("a", "b")):
        assert failed.error is not None and reason in failed.error and service.url in failed.error
    assert len(service.requests) == 1


def test_one_bad_score_in_an_answer_costs_one_sample_and_dicts_bring_metrics(serve):
    answer = {"scores": [{"score": 1, "fluency": 0.5, "note": "fine"}, None, "NaN", True]}
    first, second, third, fourth = score(
        serve(lambda samples, number: (200, answer)).url, samples_with("a", "b", "c", "d")
    )
    assert first == Score(1.0, {"fluency": 0.5}) and fourth == Score(1.0)
    assert second.error is not None and "None (NoneType) as the score" in second.error
    assert third.error is not None and "'NaN' (str) as the score" in third.error


def test_a_token_comes_from_the_environment(serve, monkeypatch):
    service = serve(lengths)
    monkeypatch.setenv("MY_TOKEN", "secret")
    score(service.url, samples_with("a"), token_env="MY_TOKEN")
    assert service.headers[0]["Authorization"] == "Bearer secret"
    with pytest.raises(ValueError, match="environment variable NO_SUCH_TOKEN"):
        make_scorer([("remote", 1.0, {"url": service.url, "token_env": "NO_SUCH_TOKEN"})])


def test_a_sample_that_json_cannot_express_is_a_clear_error(serve):
    service = serve(lengths)
    [failed] = score(service.url, [Sample("a question", "a", {1, 2}, "test", {}, 1, True)])
    assert failed.error is not None and "a sample holds a set, which JSON cannot express" in failed.error


@pytest.mark.parametrize("kwargs", [{"url": "localhost:80"}, {"batch_size": 0}, {"concurrency": 0}, {"timeout_s": 0}])
def test_wrong_remote_options_are_refused(kwargs):
    with pytest.raises(ValueError, match="the reward remote needs"):
        make_scorer([("remote", 1.0, {"url": "http://127.0.0.1:9"} | kwargs)])
