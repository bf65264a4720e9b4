#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""llmswap: one address for many local language models.

An OpenAI-compatible reverse proxy that starts the model server a request asks for,
stops others to make room, and unloads idle ones. One file, standard library only:
`python3 llmswap.py example.ini`.

    clients ──> Handler ──> Pool.lease() ──> relay() ──> llama-server, or any other
                 (9)          (5) │            (6)           ^
                                  v                          │ starts, watches, stops
                          Scheduler.decide() ──> Start, Stop ┘ ProcessBackend,
                                 (3)                           UnitBackend,
                                                               RemoteBackend (4)

Terms. A *model* is a section of the INI file. A *backend* is the running server of a
model: a process, a systemd unit, or a remote server; the relay calls it *upstream*. A
*ticket* is a waiting request, a *lease* the right to use a backend until the request
ends. *Evict*: stop to make room. *Drain*: let requests in flight end, grant no new
ones. *Unload*: stop on demand or because of idleness.

Sections, each of which uses only those above it:

    1  Errors         every failure, with its HTTP status
    2  Configuration  the INI file becomes immutable values
    3  Scheduling     which models run, stop and serve next; pure
    4  Backends       one run of one model server, from spawn to exit
    5  Pool           the one lock; carries out decisions
    6  Relay          one request to a backend, one answer to the client
    7  Repair         broken JSON in tool calls, where its meaning is certain
    8  Pages          the status page and the metrics
    9  API            what each path does; the only place that answers errors
    10 Command line   arguments, logging, signals, the order of shutdown

Threads. The main thread waits for signals. One thread accepts connections, one serves
each connection, one runs each backend, others read its output and wait for its exit;
the Pool, the log, reloads, systemd and the idle command have their own. Files that may
lie on slow mounts are read on short-lived threads. The Scheduler and the dict of
backends belong to the Pool and are used only under its one lock, which is held to
record an event and carry out what follows, never across I/O or a sleep.
"""

import base64
import bisect
import collections
import contextlib
import enum
import errno
import functools
import glob
import hashlib
import hmac
import http
import http.client
import http.server
import itertools
import json
import logging
import logging.handlers
import math
import os
import queue
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import urllib.parse
import zlib
from collections import namedtuple
from stat import S_ISSOCK
from typing import Callable, Dict, FrozenSet, Iterable, List, Mapping, NamedTuple
from typing import Optional, Sequence, Set, Tuple, Union

VERSION = "1.0"


# ==================================================================================
# 1  Errors: every failure, with its HTTP status.
#    Never knows anything else in this file.
# ==================================================================================


class ConfigError(Exception):
    """A mistake in the INI file; the text names file, line, section and key."""


class ClientDisconnected(Exception):
    """The client has disconnected, so that no answer is needed."""


INVALID, OVERLOADED = "invalid_request_error", "overloaded_error"


class APIError(Exception):
    """A failure reported to the client: HTTP status, OpenAI's error type and code.

    `param` is the parameter to blame. `retry_after` (seconds) becomes Retry-After.
    `may_retry` False becomes `x-should-retry: false`, which the OpenAI SDKs obey.
    """

    status, type, code = 500, "server_error", None
    retry_after = may_retry = None
    exit_code = 1  # of a process; also if it did not exit by itself
    is_out_of_memory = False

    def __init__(self, message, param=None, retry_after=None):
        super().__init__(message)
        self.param = param
        self.retry_after = retry_after or self.retry_after


class BadRequest(APIError):
    status, type, code = 400, INVALID, "invalid_request"

class Unauthorized(APIError):
    status, type, code = 401, "authentication_error", "invalid_api_key"

class Forbidden(APIError):
    status, type, code = 403, "permission_error", "forbidden"

class FeatureDisabled(APIError):
    status, type, code = 403, "feature_disabled", "feature_disabled"

class NotFound(APIError):
    status, type, code = 404, INVALID, "not_found"

class ModelNotFound(APIError):
    status, type, code = 404, INVALID, "model_not_found"

class MethodNotAllowed(APIError):
    status, type, code = 405, INVALID, "method_not_allowed"

class ModelNotLoaded(APIError):
    status, type, code = 409, INVALID, "model_not_loaded"

class ModelPinned(APIError):
    status, type, code, may_retry = 409, INVALID, "model_pinned", False

class RequestTimeout(APIError):
    status, type, code = 408, INVALID, "request_timeout"

class PayloadTooLarge(APIError):
    status, type, code = 413, INVALID, "request_too_large"

class UnsupportedCoding(APIError):
    status, type, code = 415, INVALID, "unsupported_content_encoding"

class HeadersTooLarge(APIError):
    status, type, code = 431, INVALID, "headers_too_large"

class RequestCancelled(APIError):
    status, type, code, may_retry = 499, INVALID, "request_cancelled", False

class ModelMisconfigured(APIError):
    code, may_retry = "model_unusable", False

class BackendDied(APIError):
    status, code = 502, "backend_died"

class LoadFailed(APIError):
    status, code, may_retry = 502, "model_start_failed", False

    def __init__(self, message, exit_code=1, is_out_of_memory=False):
        super().__init__(message)
        self.exit_code = exit_code
        self.is_out_of_memory = is_out_of_memory  # fewer models beside it may help

class LoadTimeout(LoadFailed):
    status, type, code = 504, "timeout_error", "model_load_timeout"

class LoadBackoff(APIError):
    status, code = 503, "model_backing_off"

class QueueFull(APIError):
    status, type, code, retry_after = 503, OVERLOADED, "queue_full", 5

class QueueTimeout(APIError):
    status, type, code, retry_after = 503, OVERLOADED, "queue_timeout", 5

class ModelUnloaded(APIError):
    status, code, may_retry = 503, "model_unloaded", False

class LoopDetected(APIError):
    status, code, may_retry = 508, "loop_detected", False

class ShuttingDown(APIError):
    status, code, retry_after = 503, "shutting_down", 5


# ==================================================================================
# 2  Configuration: from text to frozen values.
#    Never knows processes, sockets, clocks.
# ==================================================================================

# A *section* of the file holds *settings*, one a line. Settings are of two kinds:
# *keys* are llmswap's own and listed in the tables below; all others are *options* of
# llama-server. Options stay as written until a command is made, because only the
# table of that llama-server's options knows their spellings and which take a value.


# ---- Values: one parser per kind of text; ValueError says what was expected --------

SECONDS = {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_DURATION = 100 * 365 * SECONDS["d"]  # locks reject much longer timeouts
BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
NUMBER = r"[0-9]{1,15}(?:\.[0-9]+)?"  # as many digits as a float can hold
PORT = "[0-5]?[0-9]{1,4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
HOST = r"(?:\[([\w:.%]+)\]|([^\s\[\]:/?#*]+))"


def pattern(expected, regex, convert=lambda match: match[0]):
    """Return a parser: `convert` of the match of a whole text."""

    def parse(text):
        match = re.fullmatch(regex, text)
        if not match:
            raise ValueError(f"{text!r} is not {expected}")
        return convert(match)

    return parse


def either(word, value, parse):
    """Return a parser that reads this word as `value`, and other texts with `parse`."""

    def parse_either(text):
        if text == word:
            return value
        try:
            return parse(text)
        except ValueError as error:
            raise ValueError(f"{error}, nor {word!r}") from None

    return parse_either


def one_of(*words):
    """Return a parser that accepts these words, in any case."""
    regex = f"(?i:{'|'.join(words)})"
    return pattern(f"one of {', '.join(words)}", regex, lambda match: match[0].lower())


parse_duration = pattern(
    "a duration such as 15m",
    rf"{NUMBER}|(?:{NUMBER}(?:ms|[smhd]))+",
    lambda match: min(MAX_DURATION, sum(
        float(number) * SECONDS[unit]
        for number, unit in re.findall(rf"({NUMBER})(ms|[smhd]?)", match[0])
    )),
)
parse_size = pattern(
    "a size such as 18G",
    rf"(?ai)({NUMBER}) ?([KMGT]?)(?:i?B)?",
    lambda match: int(float(match[1]) * BYTES[match[2].upper()]),
)
parse_boolean = pattern(
    "on or off",
    "(?i)(on|true|1|enabled|yes)|off|false|0|disabled|no",
    lambda match: match[1] is not None,
)
parse_path = os.path.expanduser
parse_count = pattern("a whole number", "[0-9]{1,9}", lambda match: int(match[0]))
parse_score = pattern(
    "from -1000 to 1000", "-?(?:0?[0-9]{1,3}|1000)", lambda match: int(match[0])
)
parse_url = pattern(
    "a URL such as http://127.0.0.1:8000",
    rf"https?://{HOST}(?::(?!0)(?:{PORT}))?(?:/[^\s?#]*)?",  # but not port 0
)
parse_host_port = pattern(
    "an address such as 127.0.0.1:8080 or [::1]:8080",
    f"{HOST}:({PORT})",
    lambda match: (match[1] or match[2], int(match[3])),
)
parse_endpoint = either("none", None, pattern("a path such as /health", r"/\S*"))
parse_mac = pattern(
    "an address such as ab:cd:ef:01:23:45",
    "([0-9A-Fa-f]{2}([:-][0-9A-Fa-f]{2}){5})?",
    lambda match: bytes.fromhex(re.sub("[:-]", "", match[0])) or None,
)


def parse_words(text) -> tuple:
    """Return the parts between commas, without empty and repeated ones."""
    parts = (part.strip() for part in text.split(","))
    return tuple(dict.fromkeys(part for part in parts if part))


def each(parse, container=tuple):
    """Return a parser of the parts between commas."""
    return lambda text: container(map(parse, parse_words(text)))


parse_sets = each(lambda names: tuple(map(str.strip, names.split("+"))))
parse_hosts = each(pattern(  # in lower case, as clients and browsers send names
    "a host name without a port", rf"\*|{HOST}", lambda match: match[0].lower()
))
parse_origins = each(pattern(
    "localhost, * or an origin such as https://chat.example",
    r"(?i)(\*|localhost|null|[a-z][a-z0-9+.-]*://[^\s/*]+)/?",
    lambda match: match[1].lower(),
))

CAPABILITIES = ("vision", "audio", "tools", "embeddings", "rerank")
parse_capabilities = each(pattern(  # True by name; of `context`, the tokens
    f"one of {', '.join(CAPABILITIES)} or context 32768",
    rf"({'|'.join(CAPABILITIES)})|context[ \t]+([1-9][0-9]{{0,8}})",
    lambda match: (match[1], True) if match[1] else ("context", int(match[2])),
), dict)


def parse_resources(text, automatic=()) -> dict:
    """Return amounts by resource: "vram 18G, ram 4G". Of the `automatic` ones, the
    amount `auto` is None, and "auto" alone makes all of them None."""
    if text == "auto" and automatic:
        return dict.fromkeys(automatic)
    amounts = {}
    for part in parse_words(text):
        match = re.fullmatch(r"(\S+)[ \t]+(.+)", part)
        if not match or match[1] in amounts:
            raise ValueError(f"{part!r} is not one resource and its size: vram 18G")
        name, size = match.groups()
        is_auto = size == "auto" and name in automatic
        amounts[name] = None if is_auto else parse_size(size)
    return amounts


parse_budget = functools.partial(parse_resources, automatic=("vram", "ram"))


def resources_text(amounts) -> str:
    """Return amounts as people write them: the inverse of parse_resources."""
    parts = []
    for name, size in amounts.items():
        unit = next((unit for unit in "TGMK" if size >= BYTES[unit]), "")
        parts.append(f"{name} {size / BYTES[unit]:.4g}{unit}")
    return ", ".join(parts)


def parse_listen(text) -> tuple:
    """Return addresses: (host, port) for TCP, the path alone for a Unix socket."""
    return tuple(
        os.path.expanduser(part[len("unix:") :])
        if re.match("unix:.", part) else parse_host_port(part)
        for part in parse_words(text) or [""]  # which is refused as an address
    )


def parse_object(text) -> dict:
    """Return a JSON object; an empty text is an empty one."""
    value = json.loads(text or "{}")  # its ValueError names line and column
    json.dumps(value, allow_nan=False)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object such as {\"temperature\": 0.7}")
    return value


def parse_key_file(text) -> tuple:
    """Return the keys in a file, one a line, or () if no file is named."""
    if not text:
        return ()
    with open(os.path.expanduser(text), encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file]
    return tuple(line for line in lines if line and not line.startswith("#"))


def parse_state_dir(text) -> str:
    """Return an absolute path; `$XDG_CACHE_HOME` is `~/.cache` where it is not set."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = os.path.expandvars(text.replace("$XDG_CACHE_HOME", cache))
    return os.path.abspath(os.path.expanduser(path))


parse_request = pattern(
    "a request such as POST /sleep?level=1",
    r"(?:([A-Z]+)[ \t]+)?(/[^\s,]*)[ \t]*(\{.*\})?",
    lambda match: (
        match[1] or "POST",
        match[2],
        json.dumps(parse_object(match[3])) if match[3] else "",
    ),
)


def parse_requests(text) -> tuple:
    """Return (method, path, JSON body) of each request, separated by commas:
    "POST /wake_up, POST /collective_rpc {"method": "reload_weights"}"."""
    parts = re.split(r"[ \t]*,[ \t]*(?=[A-Z]+[ \t]|/)", text) if text else ()
    return tuple(map(parse_request, parts))


# ---- Keys: one row is parser, default, help and example.ini ------------------------


class Key(NamedTuple):
    """A key of llmswap; `default` is written as in the file and read by `parse`."""

    name: str
    parse: Callable
    default: str
    help: str

    @property
    def attribute(self):
        """The name in ProxySettings or ModelSettings."""
        return self.name.partition(".")[0].replace("-", "_")


PROXY_KEYS = (
    Key("listen", parse_listen, "127.0.0.1:8080",
        "addresses, comma-separated: `[::1]:8080`, `unix:/run/llmswap.sock`; sockets "
        "from systemd replace them"),
    Key("models-max", parse_count, "1",
        "how many may be loaded; 0: no limit, the default with `budget` or `sets`"),
    Key("budget", parse_budget, "",
        "the memory for models, e.g. `vram 24G, ram 64G`; their `needs` must fit; "
        "`auto`, or `vram auto`: what this machine has"),
    Key("models-autoload", parse_boolean, "on",
        "`off`: a request never loads a model; it is loaded by hand or on startup"),
    Key("sets", parse_sets, "",
        "which load together: `coder + embed, big + embed`; others are loaded alone"),
    Key("cache-models", parse_boolean, "off", "llama.cpp's downloads become models"),
    Key("models-dir", parse_path, "", "every GGUF in it becomes a model"),
    Key("llama-server", parse_path, "llama-server", "binary for models without one"),
    Key("state-dir", parse_state_dir, "$XDG_CACHE_HOME/llmswap",
        "folder of saved contexts and measured needs, for this user only"),
    Key("context-max", parse_size, "20G",
        "size of all saved contexts; beyond it the oldest are deleted"),
    Key("default-model", str, "", "for requests without a model; empty: the only one"),
    Key("patience", either("auto", None, parse_duration), "auto",
        "how long a busy model goes on while another waits for its room; `auto`: as "
        "long as the swap costs; 0: strict order"),
    Key("queue-max", parse_count, "512",
        "requests that may wait, more are refused; 0: no limit"),
    Key("queue-timeout", parse_duration, "0", "longest wait of a request; 0: no limit"),
    Key("api-key", parse_words, "", "comma-separated; and those of `$LLMSWAP_API_KEY`"),
    Key("api-key-file", parse_key_file, "", "a file with one key per line"),
    Key("allowed-hosts", parse_hosts, "localhost, host.docker.internal",
        "`Host` names accepted on loopback connections, beside IP literals; `*`: any"),
    Key("cors-origins", parse_origins, "localhost",
        "web origins allowed beside our own: `localhost` (any port), a list, or `*`"),
    Key("max-body", parse_size, "256M", "larger requests are refused"),
    Key("settle-timeout", parse_duration, "5s",
        "wait at most this long for the GPU memory of a stopped model to be free"),
    Key("exit-idle-time", parse_duration, "0",
        "exit after this long without a request and without a loaded model, except for "
        "`keep-loaded` ones; for socket activation; 0: never"),
    Key("idle-command", str, "",
        "run when idle, e.g. `systemctl suspend`; everything is unloaded first"),
    Key("idle-command-after", parse_duration, "1h",
        "idle time before `idle-command`; 0: never"),
    Key("watch", parse_boolean, "on", "read a changed file before the next request"),
    Key("log-level", one_of("debug", "info", "warning", "error"), "info",
        "`debug`, `info`, `warning` or `error`"),
)

MODEL_KEYS = (
    Key("cmd", str, "",
        "command line instead of llama-server; quoted as in a shell, no shell is run; "
        "`${PORT}` is the port to listen on"),
    Key("llama-server", parse_path, "llama-server", "what to run without `cmd`"),
    Key("extra-args", str, "", "appended to the command as written"),
    Key("unit", str, "",
        "the user's systemd service to start and stop; `system:NAME`: the system's"),
    Key("proxy", parse_url, "http://127.0.0.1:${PORT}",
        "base URL of the backend; alone it is a remote model"),
    Key("proxy-key", str, "", "sent to the backend as `Authorization: Bearer`"),
    Key("model-name", str, "", "sent as `model` to the backend; empty: as asked"),
    Key("uses", parse_words, "",
        "share the backend of another model; of several, comma-separated, that of one "
        "loaded, else loading, else the first; beside it only keys about requests and "
        "listing"),
    Key("alias", parse_words, "", "further names, comma-separated"),
    Key("env.NAME", str, "", "environment of the backend"),
    Key("cwd", parse_path, "", "working directory; empty: that of llmswap"),
    Key("check-endpoint", parse_endpoint, "/health",
        "path that answers 200 once ready; `none`: ready when the port accepts"),
    Key("load-timeout", parse_duration, "10m",
        "give up this long after the last progress (a line written, bytes read)"),
    Key("stop-timeout", parse_duration, "10", "seconds from SIGTERM to SIGKILL"),
    Key("cmd-stop", str, "", "run instead of SIGTERM; `${PID}` is the backend's"),
    Key("idle-timeout", parse_duration, "0",
        "unload after this long without a request; 0: never; `ttl` is the same"),
    Key("load-on-startup", parse_boolean, "off", "load when llmswap starts"),
    Key("keep-loaded", parse_boolean, "off",
        "load when llmswap starts, and again whenever it fits and nobody waits; "
        "requests for others may evict it; `idle-timeout` does not count"),
    Key("pin", either("loaded", "loaded", parse_boolean), "off",
        "`on`: neither evicted nor unloaded when idle; `loaded`: not evicted while it "
        "is loaded, and requests for what does not fit beside it are refused"),
    Key("keep-context", parse_boolean, "off",
        "save llama-server's processed prompts at its stop, restore them at its start"),
    Key("needs", either("auto", None, parse_resources), "",
        "e.g. `vram 18G, ram 4G`; `auto`: measured, the default if `budget` has auto"),
    Key("sleep-needs", parse_resources, "", "what it still holds while `sleeping`"),
    Key("concurrency", parse_count, "0", "requests at once, others wait; 0: no limit"),
    Key("oom-score-adj", parse_score, "1000",
        "likelihood that the kernel kills it when memory is short: -1000 to 1000"),
    Key("sleep", parse_requests, "",
        "e.g. `POST /sleep?level=1`: make room by putting to sleep, not by stopping"),
    Key("wake", parse_requests, "",
        "e.g. `POST /wake_up`: undo `sleep`; several with commas, each may have JSON"),
    Key("hang-timeout", parse_duration, "60s",
        "restart after so long without an answer to a request and to health; 0: never, "
        "the default of `cmd` models"),
    Key("wake-mac", parse_mac, "", "MAC address to wake while the backend is silent"),
    Key("wake-broadcast", parse_host_port, "255.255.255.255:9",
        "where Wake-on-LAN is sent"),
    Key("strip-params", parse_words, "", "parameters removed from requests"),
    Key("default-params", parse_object, "",
        "JSON object merged deep under requests, which override it"),
    Key("set-params", parse_object, "", "JSON object merged deep over requests"),
    Key("json-repair", parse_boolean, "off", "repair the arguments of tool calls"),
    Key("loading-notice", one_of("off", "comment", "reasoning"), "comment",
        "what a streaming client sees while it waits: `off`, `comment`, `reasoning`"),
    Key("unlisted", parse_boolean, "off", "`on`: not listed in `/v1/models`"),
    Key("capabilities", parse_capabilities, "",
        "shown to clients, of models other than llama-server: `vision, audio, tools, "
        "embeddings, rerank, context 32768`"),
    Key("description", str, "", "shown in `/v1/models` and on the page"),
)

PROXY_KEY = {key.name: key for key in PROXY_KEYS}
MODEL_KEY = {key.name: key for key in MODEL_KEYS}

# Variables known only when a backend starts, by the keys that may hold them. They are
# expanded then; the values here only serve to check the text.
LATE_VARIABLES = {
    **dict.fromkeys(("cmd", "extra-args", "proxy", "env.NAME"), {"PORT": 1}),
    "cmd-stop": {"PORT": 1, "PID": 1},
}
QUOTED_KEYS = ("cmd", "cmd-stop", "extra-args", "idle-command")  # as in a shell

ProxySettings = namedtuple("ProxySettings", [key.attribute for key in PROXY_KEYS])
ModelSettings = namedtuple("ModelSettings", [key.attribute for key in MODEL_KEYS])
DEFAULTS = {
    key.attribute: key.default if key.name in LATE_VARIABLES else key.parse(key.default)
    for key in MODEL_KEYS
}

# Further spellings: llama-swap's, and those of llama.cpp, which names the keys that
# only presets have like variables of the environment, too.
SYNONYMS = {
    "ttl": "idle-timeout",
    "a": "alias",
    "LLAMA-ARG-ALIAS": "alias",
    "--PRESET-LOAD-ON-STARTUP": "load-on-startup",
    "--PRESET-STOP-TIMEOUT": "stop-timeout",
}
IGNORED_KEYS = ("version", "dedup-cache-models", "--PRESET-DEDUP-CACHE-MODELS")


def model_key(name) -> Optional[Key]:
    """Return the key of a model that has this name, None if it is an option."""
    is_variable = name.startswith("env.") and name[4:].isidentifier()
    return MODEL_KEY.get("env.NAME" if is_variable else name)


def suggestion(name, names) -> str:
    """Return "; did you mean NAME?" with the nearest name, or "" if none is near."""
    import difflib  # rarely needed

    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]}?" if near else ""


# ---- Sections: the language of the file ---------------------------------------------

NEWLINE = re.compile(r"\r\n|\r|\n")
NOT_TEXT = re.compile("[\0\udc80-\udcff]")  # NUL, and bytes that are not UTF-8
STATEMENT = re.compile(  # lines indented deeper than their `cmd` continue it
    rf"""(?P<indent>[ \t]*)
    (?: \[ [ \t]* (?P<header>[^\] \t][^\]]*) \] [ \t]* (?:[;\#][^\r\n]*)?
      | -{{0,2}} (?P<key> (?P<cmd>cmd) | [A-Za-z_][A-Za-z0-9_.-]*) [ \t]* =
        (?P<value>[^\r\n]* (?(cmd) (?:(?:{NEWLINE.pattern})
            (?P=indent)[ \t]+[^ \t\r\n][^\r\n]*)* ))
      | (?:[;\#][^\r\n]*)?
      | (?P<error>[^\r\n]*)
    ) (?:{NEWLINE.pattern}|\Z)""",
    re.VERBOSE,
)

# Keys whose value is the whole line, `;` and `#` included; and keys that llama.cpp
# reads too, so that its rule holds: a comment begins at any `;` or `#`.
WITHOUT_COMMENT = (*QUOTED_KEYS, "api-key", "proxy-key", "default-params", "set-params")
SHARED_KEYS = ("alias", "stop-timeout", "load-on-startup")
OWN_COMMENT = re.compile(r"[ \t]+[;#]")
LLAMA_COMMENT = re.compile(r"[ \t]*[;#]")

EXCLUSIVE_KEYS = ("cmd", "unit", "uses")  # each of them is a kind of model
SOURCE_KEY = re.compile(
    "model|m|hf-repo|hfr?|model-url|mu|docker-repo|dr|(?!spec-).*-default|fim-.*-spec"
    "|LLAMA-ARG-(?:MODEL|HF-REPO|MODEL-URL|DOCKER-REPO)"
)


class Setting(NamedTuple):
    """One `key = text`; `place` names file, line, section and key as it is written,
    while `key` has dashes and is no synonym."""

    key: str
    text: str
    place: str


class Section(NamedTuple):
    """One section; its settings by key, of equal ones the last."""

    name: str
    place: str
    settings: dict
    source: str = "preset"  # of its model, as llama.cpp's router calls it

    def is_own(self, key) -> bool:
        """Return whether llmswap, not llama-server, reads this key."""
        return self.name in ("llmswap", "macros") or model_key(key) is not None

    @property
    def has_source(self) -> bool:
        """Whether one of its options says where the model's file is."""
        return any(map(SOURCE_KEY.fullmatch, self.settings))

    @property
    def kind(self) -> str:
        """The kind of the model whose own section this is."""
        proxy = self.settings.get("proxy")
        is_remote = proxy and not (needs_port(proxy.text) or self.has_source)
        default = "remote" if is_remote else "llama-server"
        return next((key for key in EXCLUSIVE_KEYS if key in self.settings), default)


def parse_presets(data, path, warn) -> dict:
    """Return the sections by name; of those with the same only the last. Beyond what
    llama.cpp reads, lines may be indented and keys have dashes. Raise ConfigError."""
    sections, section, line = {}, None, 1
    for statement in STATEMENT.finditer(data.decode("utf-8-sig", "surrogateescape")):
        place = f"{path}:{line}:"
        line += len(NEWLINE.findall(statement[0]))
        if statement["error"] or NOT_TEXT.search(statement[0]):
            raise ConfigError(f"{place} {statement[0].strip()!r} is neither [section], "
                              "key = value nor a comment, in UTF-8")
        name, key = statement["header"], statement["key"]
        if key and section is None and key.replace("_", "-") not in IGNORED_KEYS:
            name = "default"
            warn(f"{place} keys before the first section make a model 'default'; "
                 "keys for all models belong in [*]")
        if name:
            name = name.strip() if name.strip() in ("llmswap", "macros") else name
            if sections.pop(name, None):
                warn(f"{place} [{name}]: given before; this one counts")
            section = sections[name] = Section(name, f"{place} [{name}]", {})
        if key and section:
            add_setting(section, key, statement["value"], place, warn)
    return sections


def add_setting(section, key, text, place, warn):
    """Add the setting on a line: without its comment, if it can have one."""
    place = f"{place} [{section.name}] {key}"
    if section.name != "macros" and not key.startswith("env."):
        key = key.replace("_", "-")
        key = SYNONYMS.get(key, key)
        if key in IGNORED_KEYS:
            return
    if key == "cmd":
        lines = [line.strip(" \t") for line in NEWLINE.split(text)]
        lines = [re.sub(r"^[;#].*|[ \t]*\\$", "", line) for line in lines]
        text = " ".join(filter(None, lines))
    has_own_rule = section.is_own(key) and key not in SHARED_KEYS
    rule = OWN_COMMENT if has_own_rule else LLAMA_COMMENT
    comment = None if key in WITHOUT_COMMENT else rule.search(text)
    value = text[: comment.start() if comment else None].strip(" \t")
    if comment and (comment[0] in (";", "#") or value.count('"') % 2):
        warn(f"{place}: a comment begins at {comment[0][-1]!r}, as in llama.cpp; "
             f"the value is {value!r}")
    if key in section.settings:
        warn(f"{place}: given before; this one counts")
    section.settings[key] = Setting(key, value, place)


# ---- Texts: with variables and macros as ${NAME}, some quoted as in a shell ----------

VARIABLE = re.compile(r"\$\$\{|\$\{([^{}]*)\}")
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
SHELL_SYNTAX = re.compile(
    r"&&?|\|\|?|;|[0-9]*[<>]{1,2}[&\w./~-]*|[^;\s]+;|\$\(.*|`.*|#.*|\$[A-Za-z_]\w*"
)


def expand(text, variables, **more) -> str:
    """Return the text with each ${NAME} replaced and each $${ a literal ${; raise
    ValueError for a name that has no value."""
    values = {**variables, **more, None: "${"}
    try:
        return VARIABLE.sub(lambda match: str(values[match[1]]), text)
    except KeyError as error:
        reason = f"${{{error.args[0]}}} is unknown here"
        raise ValueError(f"{reason}; $${{ is a literal ${{") from None


def needs_port(text) -> bool:
    """Return whether ${PORT} stands in the text."""
    return "PORT" in VARIABLE.findall(text)


def expand_macros(section, macros):
    """Replace the macros in a section's settings; macros may use macros, ten deep. In a
    file without macros, ${ means nothing in options, as for llama-server."""
    for key, (_, text, place) in section.settings.items():
        if not macros and not section.is_own(key):
            text = text.replace("${", "$${")
        for _ in range(10):
            text = VARIABLE.sub(lambda match: macros.get(match[1], match[0]), text)
        section.settings[key] = Setting(key, text, place)


def read_setting(key, setting, variables, warn):
    """Return the value of the key, or raise ConfigError with the setting's place. A
    text that may hold ${PORT} or ${PID} is returned as it is. `warn` is called for
    words of a command that only a shell understands."""
    late = LATE_VARIABLES.get(key.name, {})
    try:
        value = key.parse(expand(setting.text, variables, **late))
        value = setting.text if late else value
        words = shlex.split(value) if key.name in QUOTED_KEYS else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting.place}: {error}") from None
    shell_words = " ".join(filter(SHELL_SYNTAX.fullmatch, words))
    if shell_words:
        warn(f"{setting.place}: only a shell understands {shell_words}, and none is "
             "run: write sh -c '...', and ${env.NAME} for $NAME")
    return value


def split_words(text) -> list:
    """Return the words of a text; a `~` at the beginning of one is expanded."""
    return [os.path.expanduser(word) for word in shlex.split(text)]


def with_environment(words) -> list:
    """Return the command, run by env(1) if it begins with NAME=value words."""
    return ["env", *words] if words and ASSIGNMENT.match(words[0]) else words


# ---- Options of llama-server ---------------------------------------------------------

TRUTHY = ("on", "enabled", "true", "1")  # llama.cpp's words, in lower case only
FALSY = ("off", "disabled", "false", "0")
OPTION_HELP = re.compile(
    r"^(-(?!--)[^\s,]+(?:, +-[^\s,]+)*)(?: (\S+(?: [A-Z]+)?)| {2,}|$)"
    r".*((?:\n {40}.*)*)",
    re.MULTILINE,
)

# Options that llama.cpp's router takes out of its presets: they are the router's own.
ROUTER_OPTIONS = frozenset(
    "--api-key --api-key-file --ssl-key-file --ssl-cert-file --models-dir --models-max "
    "--models-preset --models-autoload".split()
)
NOT_IN_PRESETS = ("--host", "--port", "--alias", "--tags")  # which the router shows
PRESET_ONLY_KEYS = ("load-on-startup", "stop-timeout")


class Option(NamedTuple):
    """One option: its spellings in the order of --help, how many values follow, and
    the variables of the environment that set it."""

    names: tuple
    negatives: tuple = ()
    values: int = 1
    variables: Sequence[str] = ()

    @property
    def name(self):
        """The spelling that llama.cpp's router uses."""
        return self.names[-1]

    def value(self, key, text) -> str:
        """Return the value that `key = text` gives the option."""
        if key in [name.lstrip("-") for name in self.negatives]:
            return "false" if text in TRUTHY else "true"
        return text

    def words(self, value) -> list:
        """Return what llama.cpp's router puts on a command line for this value."""
        if self.values:
            return [self.name, value]
        return list(self.names[-1:] if value not in FALSY else self.negatives[-1:])


class OptionTable:
    """The options of one llama-server by key. An empty table means that they are
    unknown: each key is an option with a value."""

    def __init__(self, options=()):
        self.by_key = {}  # as in llama.cpp, a later option takes a key from an earlier
        for option in options:
            for name in (*option.names, *option.negatives, *option.variables):
                self.by_key[name.lstrip("-").replace("_", "-")] = option

    def find(self, key) -> Optional[Option]:
        """Return the option that a key means, or None."""
        return self.by_key.get(key) if self.by_key else Option((f"--{key}",))

    def choose(self, settings) -> list:
        """Return the options and their values in the order of llama.cpp's router; the
        last setting of each counts. Raise ConfigError for unknown ones."""
        chosen = {}
        for key, text, place in settings:
            option = self.find(key)
            if option is None:
                reason = "neither a key of llmswap nor an option of this llama-server"
                raise ConfigError(f"{place}: {unknown_key(key, reason, self.by_key)}")
            if ROUTER_OPTIONS.isdisjoint(option.names):
                chosen[option.names[0]] = option, option.value(key, text)
        return [chosen[name] for name in sorted(chosen)]

    def read(self, words) -> dict:
        """Return the option values on a command line by name; "" for a flag."""
        values = {}
        for word, following in zip(words, [*words[1:], ""]):
            option = self.by_key.get(word.lstrip("-"), Option((word,)))
            if word in option.negatives:
                values[word] = ""
            elif word.startswith("-") and word in option.names:
                values[option.name] = following if option.values else ""
        return values

    def pitfalls(self, options):
        """Yield warnings of a Model's options that mean something else to llama.cpp."""
        first_keys = {}
        for strength, (key, text, place) in options:
            option = self.find(key) or Option((key,))
            first_key = first_keys.setdefault((strength, option.names[0]), key)
            if first_key != key:
                yield f"{place}: the same option as {first_key}; this one counts"
            if not ROUTER_OPTIONS.isdisjoint(option.names):
                yield f"{place}: {unknown_key(key, 'not of a model')}; it is ignored"
            elif not option.values and text not in TRUTHY + FALSY:
                word = "".join(option.words(option.value(key, text)))
                yield (f"{place}: {text!r} is neither true nor false; "
                       f"llama.cpp makes it {word}")
            elif option.values and re.fullmatch("\".*\"|'.*'", text):
                yield f"{place}: the quotes are part of the value {text}"


UNKNOWN_OPTIONS = OptionTable()


def unknown_key(key, reason, options=()) -> str:
    """Return why the key is wrong: `reason` and the nearest key or option."""
    if key in PROXY_KEY:
        return "belongs in [llmswap]"
    return reason + suggestion(key, [*MODEL_KEY, *options])


def parse_help(text) -> Optional[OptionTable]:
    """Return the options in the output of llama-server --help; None for other text. A
    name in the first column begins an option; a hint one blank after the last name is
    its value, two words in capitals are two. Of a flag's further names, those with "no"
    are negatives."""
    options = []
    for match in OPTION_HELP.finditer(text):
        names, values = re.split(", +", match[1]), len((match[2] or "").split())
        variables = re.findall(r"\(env: (\w+)\)$", match[3])
        negatives = [] if values else [n for n in names[1:] if re.match("--no-|-n", n)]
        if negatives:
            variables += [name.replace("_ARG_", "_ARG_NO_", 1) for name in variables]
        positives = tuple(name for name in names if name not in negatives)
        options.append(Option(positives, tuple(negatives), values, variables))
    return OptionTable(options) if len(options) >= 150 else None


# ---- Models --------------------------------------------------------------------------

# The keys whose change needs a new backend, by kind of model.
PROCESS_KEYS = ("extra_args", "proxy", "env", "cwd", "oom_score_adj")
LAUNCH_KEYS = {
    "llama-server": ("llama_server", "keep_context", *PROCESS_KEYS),
    "cmd": ("cmd", *PROCESS_KEYS),
    "unit": ("unit", "proxy"),
    "remote": ("proxy",),
    "uses": ("uses",),
}
REQUEST_KEYS = (  # and those of listing: they may stand beside `uses`
    "model-name", "uses", "alias", "strip-params", "default-params", "set-params",
    "json-repair", "loading-notice", "unlisted", "capabilities", "description",
)
SAVE_PATH = "slot-save-path"  # the option of llama-server that `keep-context` needs


class Model(NamedTuple):
    """One model as the file describes it. Its options, environment and commands may
    hold variables, which the methods expand."""

    name: str
    kind: str
    place: str
    settings: ModelSettings
    options: tuple  # settings with the strength of their section, in that order
    variables: dict
    backends: tuple  # ids of the models whose backend may serve it, the best first
    problem: Optional[str]  # why it cannot be used
    aliases: tuple = ()
    source: str = "preset"  # as llama.cpp's router calls it
    preset_only: tuple = ()  # keys and texts of llama.cpp's presets that are no options
    context_dir: str = ""  # of its saved contexts, with a slash; empty: none are saved

    @property
    def has_auto_needs(self) -> bool:
        """Whether its needs are measured or estimated."""
        return self.settings.needs is None and self.kind not in ("remote", "uses")

    @property
    def is_pinned(self) -> bool:
        """Whether it is never evicted, loaded or not."""
        return self.settings.pin is True and not self.problem

    @property
    def launch(self) -> tuple:
        """The settings of the backend; a reload that keeps them keeps it running."""
        values = [getattr(self.settings, name) for name in LAUNCH_KEYS[self.kind]]
        return self.kind, values, [(key, text) for _, (key, text, _) in self.options]

    def command(self, table, port) -> list:
        """Return the argv of a model that is a process; [] for other kinds. Raise
        ConfigError for options that the table does not have."""
        try:
            text = f"{self.settings.cmd} {self.settings.extra_args}"
            words = self._words(text, PORT=port)
            if self.kind == "cmd":
                return with_environment(words)
            if self.kind != "llama-server":
                return []
            options = self._choose_options(table, port)
        except ValueError as error:
            raise ConfigError(self.problem or f"{self.place}: {error}") from None
        chosen = [word for option, value in options for word in option.words(value)]
        return [self.settings.llama_server, *chosen, *words]

    def preset(self, table) -> str:
        """Return the section of a llama-server model as llama.cpp's router shows it."""
        pairs = [(option.name.lstrip("-"), value)
                 for option, value in self._choose_options(table, "0")
                 if option.name not in NOT_IN_PRESETS]
        lines = [f"{key} = {text}\n" for key, text in [*pairs, *self.preset_only]]
        return f"[{self.name}]\n{''.join(lines)}\n"

    def _choose_options(self, table, port):
        fixed = {"host": "127.0.0.1", "port": str(port), "alias": self.name}
        if "log-colors" in table.by_key:
            fixed["log-colors"] = "off"
        settings = [
            Setting(key, self._expand(os.path.expanduser(text), PORT=port), place)
            for _, (key, text, place) in self.options
        ]
        if self.context_dir and table.find(SAVE_PATH):  # the file may override it
            settings.insert(0, Setting(SAVE_PATH, self.context_dir, self.place))
        settings += [Setting(key, text, self.place) for key, text in fixed.items()]
        return table.choose(settings)

    def stop_command(self, port, pid) -> list:
        """Return the argv of cmd-stop; [] if there is none."""
        return with_environment(self._words(self.settings.cmd_stop, PORT=port, PID=pid))

    def url(self, port) -> str:
        """Return the base URL of the backend."""
        return self._expand(self.settings.proxy, PORT=port).rstrip("/")

    def environment(self, port) -> dict:
        """Return the variables that the backend has beside those of llmswap."""
        variables = self.settings.env.items()
        return {name: self._expand(text, PORT=port) for name, text in variables}

    def _words(self, text, **more):
        return [self._expand(word, **more) for word in split_words(text)]

    def _expand(self, text, **more):
        return expand(text, self.variables, **more)


def folder_name(name) -> str:
    """Return the model's name for files, or a hash if it cannot be one."""
    quoted = urllib.parse.quote(name, safe="", errors="surrogateescape")
    if quoted.startswith(".") or len(quoted) > 100:
        return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    return quoted


def canonical_name(name) -> str:
    """Return llama.cpp's spelling of a section name: `qwen3:8b` is `qwen3:8B`."""
    head, colon, tag = name.rpartition(":")
    match = re.search(r"(?ai)[-.]([A-Z0-9_]+)\Z", tag)
    tag = re.sub("[a-z]+", lambda part: part[0].upper(), match[1] if match else tag)
    return head + colon + tag if colon else name


def find_models(directory):
    """Yield the id of each model in a directory (of files and folders), and its source
    and options, as llama-server has them. Raise OSError."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        # of a split model, llama-server wants the first file
        _, _, names = next(os.walk(entry.path), ("", (), ()))  # nothing for a file
        names = sorted(names, key=lambda name: ("-00001-of-" not in name, name))
        options = {}
        for path in [os.path.join(entry.path, n) for n in names] or [entry.path]:
            match = re.search(r"/(mtp-|dspark-|dflash-)?[^/]*\.gguf\Z", path)
            if match:
                key = "model-draft" if match[1] else "model"
                options.setdefault("mmproj" if "mmproj" in match[0] else key, path)
        if "model" in options:
            yield entry.name.replace(".gguf", ""), ("models_dir", options)


# ---- From sections to a configuration ------------------------------------------------


def why_not_together(model, pinned, settings) -> Optional[str]:
    """Return why a model cannot be loaded beside the pinned ones, or None."""
    if model.has_auto_needs and not settings.budget:
        return "needs = auto is of no use without a budget in [llmswap]"
    for name in (*(model.settings.needs or ()), *model.settings.sleep_needs):
        if name not in settings.budget:
            return f"budget in [llmswap] does not name {name!r}"
    models = [*pinned, model]
    counted = {each.name for each in models if each.kind not in ("remote", "uses")}
    beside = f" beside the pinned {', '.join(each.name for each in pinned)}"
    prefix = f"does not fit{beside if pinned else ''}:"
    if 0 < settings.models_max < len(counted):
        return f"{prefix} models-max is {settings.models_max}"
    is_together = len(counted) < 2 or any(counted <= names for names in settings.sets)
    if settings.sets and not is_together:
        return f"{prefix} none of sets has them together"
    for name, limit in settings.budget.items():
        needed = sum((each.settings.needs or {}).get(name, 0) for each in models)
        if limit is not None and needed > limit:
            need, budget = resources_text({name: needed}), resources_text({name: limit})
            return f"{prefix} they need {need}, the budget is {budget}"
    return None


class Config(NamedTuple):
    """The content of a file: `models` by id, in its order; `names` to their ids."""

    path: str
    settings: ProxySettings
    models: dict
    names: dict
    api_keys: tuple
    warnings: tuple
    cached: Sequence[str] = ()  # names of the models in llama.cpp's cache

    def find(self, name) -> Optional[str]:
        """Return the id of the model with this name, which may differ in case."""
        return self.names.get(name) or self.names.get(name.strip().casefold())

    def resolve(self, name) -> Model:
        """Return the model of this name, or raise ModelNotFound with similar names."""
        model_id = self.find(name)
        if model_id is not None:
            return self.models[model_id]
        listed = [m.name for m in self.models.values() if not m.settings.unlisted]
        names = [each for each, owner in self.names.items() if owner in listed]
        near = suggestion(name, names) or ";"
        listed[8:] = ["..."] if len(listed) > 8 else []
        shown = ", ".join(listed) or "none"
        text = f"there is no model {name!r}{near} there are {shown}"
        raise ModelNotFound(text, "model")

    def default_model(self) -> Optional[Model]:
        """Return the model for requests that name none, if there is one."""
        if self.settings.default_model:
            return self.models[self.settings.default_model]
        return next(iter(self.models.values())) if len(self.models) == 1 else None

    def pitfalls(self, table_of: Callable) -> List[str]:
        """Return warnings of options that mean something else to llama.cpp;
        table_of(model) is the OptionTable of a llama-server model."""
        models = [model for model in self.models.values() if model.options]
        return list(dict.fromkeys(
            text for model in models for text in table_of(model).pitfalls(model.options)
        ))


WITHOUT_FILE = b"[llmswap]\ncache-models = on\n"


def load_config(
    path, listen=None, models_max=None, environ=os.environ, list_cached=lambda _: ()
) -> Config:
    """Return the Config of a file, or of WITHOUT_FILE if `path` is None. `listen` and
    `models_max` override the file's. `list_cached(binary)` returns the names of the
    models in llama.cpp's cache and is called if they become models. Raise ConfigError.
    """
    data = WITHOUT_FILE
    if path is not None:
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
    loader = ConfigLoader(data, str(path or ""), environ, list_cached)
    return loader.load({"listen": listen, "models-max": models_max})


class ConfigLoader:
    """Makes a Config of the bytes of one file."""

    def __init__(self, data, path, environ, list_cached=lambda _: ()):
        self._path = path
        self._list_cached = list_cached
        self._variables = {f"env.{name}": value for name, value in environ.items()}
        self._warnings = []
        self._warn = self._warnings.append
        self._sections = parse_presets(data, path, self._warn)
        self._star, llmswap, macros = (
            self._sections.pop(name, Section(name, "", {}))
            for name in ("*", "llmswap", "macros")
        )
        self._ids = {canonical_name(name): name for name in sorted(self._sections)}
        self._written = llmswap.settings
        written = map(self._written.get, ("api-key", "api-key-file"))
        self._key_places = [each.place for each in written if each and each.text]
        macros = {name: setting.text for name, setting in macros.settings.items()}
        for section in (self._star, llmswap, *self._sections.values()):
            expand_macros(section, macros)

    def load(self, overrides) -> Config:
        """Return the Config, or raise ConfigError. `overrides`: texts by key, or None
        for those that the file decides."""
        settings = self._read_settings(overrides)
        cached = settings.cache_models and self._list_cached(settings.llama_server)
        cached = cached or ()
        models = self._build_models(settings, cached)
        names = self._assign_names(models, cached)
        more_keys = parse_words(self._variables.get("env.LLMSWAP_API_KEY", ""))
        keys = (*settings.api_key, *more_keys, *settings.api_key_file)
        if self._key_places and not keys:  # all would be open
            raise ConfigError(f"{self._key_places[0]}: there is no key in it")
        config = Config(self._path, settings, models, names, keys, (), cached)
        config = config._replace(settings=self._resolve_names(config))
        pinned = []
        for model in sorted(models.values(), key=lambda each: not each.is_pinned):
            reason = why_not_together(model, pinned, config.settings)
            if reason and not model.problem:
                models[model.name] = model._replace(problem=f"{model.place}: {reason}")
            elif model.is_pinned:
                pinned.append(model)
        for model in models.values():
            if model.kind == "uses" and not model.problem:
                models[model.name] = self._link(model, config)
        return config._replace(warnings=tuple(dict.fromkeys(self._warnings)))

    def _read_settings(self, overrides):
        star, written = self._star.settings, self._written
        for key, setting in written.items():
            if key not in PROXY_KEY:
                reason = f"unknown key{suggestion(key, PROXY_KEY)}"
                if model_key(key):
                    reason = "belongs to a model, or in [*]"
                raise ConfigError(f"{setting.place}: {reason}")
        if "models-max" in star and star["models-max"].text.isdigit():
            written.setdefault("models-max", star.pop("models-max"))  # often there
        if "llama-server" in star:
            written.setdefault("llama-server", star["llama-server"])
        for name, text in overrides.items():
            if text is not None:
                written[name] = Setting(name, str(text), f"--{name}")
        values = {}
        for key in PROXY_KEYS:
            setting = written.get(key.name, Setting(key.name, key.default, ""))
            value = read_setting(key, setting, self._variables, self._warn)
            values[key.attribute] = value
        if "models-max" not in written and (values["budget"] or values["sets"]):
            values["models_max"] = 0
        return ProxySettings(**values)

    def _build_models(self, proxy, cached):
        """Return the models by id. Of sections with the same canonical name only the
        last in byte order is one."""
        star = self._star
        for name in star.settings.keys() & {*EXCLUSIVE_KEYS, "proxy", "alias"}:
            place = star.settings[name].place
            raise ConfigError(f"{place}: cannot be given for all models")
        listed = self._list_models(proxy.models_dir, cached)
        layers = {section.name: [star, section] for section in listed}
        for name, section in self._sections.items():
            last = self._ids.get(name, name)
            if last != name:
                text = f"replaced by [{last}], the same in llama.cpp"
                self._warn(f"{section.place}: {text}")
            elif name != "default" or section.settings:
                layers.setdefault(name, [star]).append(section)
        models = {name: self._build_model(layers[name], proxy) for name in layers}
        kinds = {model.kind for model in models.values()}
        if kinds and "llama-server" not in kinds:
            for key, setting in star.settings.items():
                if not model_key(key):
                    text = unknown_key(key, "no model here is a llama-server")
                    self._warn(f"{setting.place}: without effect: {text}")
        return models

    def _list_models(self, directory, cached):
        """Yield sections of the models in llama.cpp's cache and in models-dir. One in
        the cache has the id of its section in the file, if there is one."""
        models = {  # where they come from and their options, by id
            self._ids.get(name, name): ("cache", {"hf-repo": name, "offline": "on"})
            for name in cached
        }
        try:
            models.update(find_models(directory) if directory else ())
        except OSError as error:
            self._warn(f"{self._written['models-dir'].place}: {error}")
        for name, (source, options) in models.items():
            place = f"{self._path}: [{name}]" if self._path else f"[{name}]"
            settings = {
                key: Setting(key, text.replace("${", "$${"), f"{place} {key}")
                for key, text in options.items()
            }
            yield Section(name, place, settings, source)

    def _build_model(self, layers, proxy):
        """Return the Model of sections, the weakest first, the last its own. The first
        mistake becomes its problem; values that cannot be read are the defaults."""
        own, kind, keys, options = layers[-1], layers[-1].kind, {}, {}
        for strength, layer in enumerate(layers):
            for name, setting in layer.settings.items():
                if not model_key(name):
                    options[name] = strength, setting
                elif kind != "uses" or name in REQUEST_KEYS:
                    keys[name] = setting
        options = sorted(options.values()) if kind == "llama-server" else []
        variables = {**self._variables, "MODEL_ID": own.name}
        values, problems = {**DEFAULTS, "llama_server": proxy.llama_server}, []
        if kind == "cmd":
            values["hang_timeout"] = 0.0
        if None in proxy.budget.values():
            values["needs"] = None
        for setting in [*keys.values(), *(setting for _, setting in options)]:
            key = model_key(setting.key) or MODEL_KEY["env.NAME"]  # with ${PORT}, too
            try:
                value = read_setting(key, setting, variables, self._warn)
                values[key.attribute] = value
            except ConfigError as error:
                if key.name in PRESET_ONLY_KEYS:  # llama.cpp takes anything for them
                    self._warn(f"{error}; taken as {key.default}")
                else:
                    problems.append(str(error))
                    keys.pop(setting.key, None)  # of env: it cannot be expanded
        env = {name[4:]: keys[name].text for name in keys if name.startswith("env.")}
        settings, context_dir = ModelSettings(**{**values, "env": env}), ""
        if settings.keep_context and kind == "llama-server":
            context_dir = f"{proxy.state_dir}/context/{folder_name(own.name)}/"
        preset_only = [(key, keys[key].text) for key in PRESET_ONLY_KEYS if key in keys]
        problems += self._mistakes(layers, settings)
        return Model(
            own.name, kind, own.place, settings, tuple(options), variables, (own.name,),
            problem=next(iter(problems), None), source=own.source,
            preset_only=tuple(preset_only), context_dir=context_dir,
        )

    def _mistakes(self, layers, settings):
        """Yield what is wrong for this kind of model, with the place to blame."""
        section, kind, own = layers[-1], layers[-1].kind, layers[-1].settings
        launch_keys = {*itertools.chain(*LAUNCH_KEYS.values())} - {*LAUNCH_KEYS[kind]}
        for name, (_, _, place) in own.items():
            key = model_key(name)
            is_other_kind = name in EXCLUSIVE_KEYS and name != kind
            if not key and kind != "llama-server":
                why = f"options of llama-server cannot stand beside {kind}"
                yield f"{place}: {unknown_key(name, f'no key of llmswap; {why}')}"
            elif is_other_kind or kind == "uses" and name not in REQUEST_KEYS:
                yield f"{place}: cannot stand beside {kind}"
            elif key and key.attribute in launch_keys:
                self._warn(f"{place}: without effect beside {kind}")
        here, proxy_place = section.place, own.get("proxy", section).place
        has_port = needs_port(settings.proxy)
        texts = [settings.cmd, settings.extra_args, *settings.env.values()]
        if kind == "llama-server" and not any(layer.has_source for layer in layers):
            yield f"{here}: it has no source: model, hf-repo, model-url or docker-repo"
        if kind == "llama-server" and not has_port:
            yield f"{proxy_place}: the proxy of a llama-server needs ${{PORT}}"
        if kind == "cmd" and has_port and not any(map(needs_port, texts)):
            yield f"{own['cmd'].place}: without ${{PORT}} it needs proxy = URL"
        if kind in EXCLUSIVE_KEYS and not getattr(settings, kind):
            yield f"{own[kind].place}: it must not be empty"
        if kind in ("unit", "remote") and has_port:
            yield f"{proxy_place}: it needs proxy = URL, without ${{PORT}}"
        if settings.proxy.rstrip("/").endswith("/v1"):
            self._warn(f"{proxy_place}: what clients ask for begins with /v1 already")
        if bool(settings.sleep) != bool(settings.wake):
            yield f"{here}: sleep and wake need each other"

    def _assign_names(self, models, cached):
        """Return the ids of the models by name: by id, alias, canonical name,
        repository with one cached model, and by these in lower case. A name keeps its
        first owner. The models' aliases become those that they own."""
        names = {name: name for name in models}
        claims = [("the alias", alias, model) for model in models.values()
                  for alias in model.settings.alias]
        claims += [("llama.cpp's name", canonical_name(name), models[name])
                   for name in sorted(models, reverse=True)]
        for label, name, model in claims:
            owner = names.setdefault(name, model.name)
            if owner != model.name:
                self._warn(f"{model.place}: {label} {name!r} already means [{owner}]")
        for name, model in models.items():
            aliases = [each for each in model.settings.alias if names[each] == name]
            aliases = tuple(alias for alias in aliases if alias != name)
            models[name] = model._replace(aliases=aliases)
        repositories = [name.rpartition(":")[0] for name in cached]
        for repository, name in zip(repositories, cached):
            if repositories.count(repository) == 1:
                names.setdefault(repository, names[name])
        for name, owner in [*names.items()]:
            names.setdefault(name.strip().casefold(), owner)
        return names

    def _resolve_names(self, config):
        """Return the settings with ids in the place of names of models."""
        sets, default, key = [], config.settings.default_model, "sets"
        try:
            for names in config.settings.sets:
                models = map(config.resolve, names)
                backends = [[*filter(None, map(config.find, model.settings.uses))]
                            or [model.name] for model in models]
                sets += map(frozenset, itertools.product(*backends))
            key = "default-model"
            default = default and config.resolve(default).name
        except ModelNotFound as error:
            raise ConfigError(f"{self._written[key].place}: {error}") from None
        return config.settings._replace(sets=tuple(sets), default_model=default)

    def _link(self, model, config):
        """Return a `uses` model with the backends of the usable models that it names,
        or a problem: none is usable, or one is unknown or itself of kind `uses`."""
        targets = {
            name: config.models.get(config.find(name)) for name in model.settings.uses
        }
        usable = [each.name for each in targets.values() if each and not each.problem]
        for name, target in targets.items():
            if target is None:
                reason = f"there is no model {name!r} to use"
            elif target.kind == "uses":
                reason = f"{target.name!r} itself uses another model"
            elif not usable:
                reason = f"it uses {target.name!r}: {target.problem}"
            else:
                continue
            return model._replace(problem=f"{model.place}: {reason}")
        return model._replace(backends=tuple(usable))


# ==================================================================================
# 3  Scheduling: which models run, which are stopped, which request is served next.
#    Never knows clocks, threads, sockets, processes, the log or the configuration.
#
#    Events change plain data and decide nothing. `decide(now)` walks the queue from
#    the oldest ticket to the youngest and returns decisions as values, and with them
#    the next deadline: the moment at which time alone may change the outcome.
#    All times are seconds on one clock of the caller's. One thread at a time.
#
#        submit, finish ─────────────┐                        ┌── Grant, Refuse
#        loaded, slept, exited ──────┼──> models and queue ──>┤
#        unload, configure, close ───┘      decide(now)       └── Start, Stop
# ==================================================================================


class State(enum.Enum):
    """What a backend is doing, in llama.cpp's words (and `unloading`)."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    SLEEPING = "sleeping"
    UNLOADING = "unloading"


NEXT_STATES = {  # waking is a start; a backend may fall asleep and wake by itself
    State.UNLOADED: (State.LOADING,),
    State.LOADING: (State.LOADED, State.UNLOADING, State.UNLOADED),
    State.LOADED: (State.SLEEPING, State.UNLOADING, State.UNLOADED),
    State.SLEEPING: (State.LOADING, State.LOADED, State.UNLOADING, State.UNLOADED),
    State.UNLOADING: (State.SLEEPING, State.UNLOADED),
}
SOONEST_FIRST = State.LOADED, State.LOADING, State.SLEEPING  # to serve a request
MIN_RETURN_GAP = 0.005  # s; a client that sends its next request at once needs less
UNKNOWN_SWAP_COST = 1.0  # s; assumed before a swap was measured
MAX_PATIENCE = 30.0  # s
MAX_BACKOFF = 60.0  # s
FAILURES_TO_BACK_OFF = 3  # in a row; after fewer the next load need not wait


class ModelSpec(NamedTuple):
    """What scheduling must know of a model. Times in seconds; 0 means never, no limit.
    One on another machine, which may be asleep, takes none of models-max."""

    needs: Mapping[str, int] = {}
    sleep_needs: Mapping[str, int] = {}
    is_local: bool = True  # else on another machine: its failed loads cause no back-off
    is_pinned: bool = False  # neither evicted nor unloaded when idle
    is_pinned_once_loaded: bool = False  # not evicted while it is loaded
    keep_loaded: bool = False  # started whenever it fits and no ticket waits
    can_sleep: bool = False  # put to sleep, not stopped, when another needs its room
    concurrency: int = 0
    idle_timeout: float = 0.0
    stop_timeout: float = 10.0
    problem: Optional[APIError] = None  # refuses its tickets


class ModelUsage(NamedTuple):
    """What one backend takes of models-max and of the budget."""

    name: str
    places: int
    needs: Mapping[str, int]


class Limits(NamedTuple):
    """What may be loaded together, how many tickets may wait, and how long: 0 means no
    limit."""

    models_max: int = 1
    budget: Mapping[str, int] = {}
    sets: Tuple[FrozenSet[str], ...] = ()
    patience: Optional[float] = None  # learned from the measured cost of swaps
    queue_max: int = 512
    queue_timeout: float = 0.0

    def allow(self, usages: Iterable[ModelUsage]) -> bool:
        """Whether all of these fit together; then fewer of them fit, too."""
        usages = list(usages)
        names = {each.name for each in usages if each.places}
        if 0 < self.models_max < len(names):
            return False
        for name, amount in self.budget.items():
            if sum(each.needs.get(name, 0) for each in usages) > amount:
                return False
        is_free = len(names) < 2 or not self.sets
        return is_free or any(names <= together for together in self.sets)


class Grant(NamedTuple):
    """The request of this ticket may use its backend."""

    ticket: "Ticket"


class Refuse(NamedTuple):
    """The request of this ticket fails with this problem."""

    ticket: "Ticket"
    problem: APIError


class Start(NamedTuple):
    """Start the backend of this model, or wake it; its events carry this run."""

    name: str
    run: int
    is_wake: bool = False


class Stop(NamedTuple):
    """Stop the backend of this model (one that loads is to be killed), or put it to
    sleep."""

    name: str
    run: int
    cause: str  # evicted, idle, unload, reload, abandoned or shutdown
    newcomer: Optional[str] = None  # the model that needs the room
    to_sleep: bool = False


class Ticket:
    """A request that waits for a backend or, once granted, holds a lease of it."""

    def __init__(
        self, number, model, arrived, preemptible=False, manual=False, load_refusal=None
    ):
        self.number = number
        self.model = model
        self.arrived = arrived
        self.preemptible = preemptible  # the lease ends with a stop; none waits for it
        self.manual = manual  # it loads the model and holds no lease
        self.load_refusal = load_refusal  # for the case that its model is to be loaded
        self.run = None  # of the backend that was granted
        self.waiter = None  # belongs to the caller


class ModelState:
    """One model in the schedule. Only the Scheduler changes it."""

    def __init__(self, name: str, spec: ModelSpec):
        self.name = name
        self.spec = spec
        self.state = State.UNLOADED
        self.changed_at = None  # when it entered its state; None: never
        self.waiting = 0  # tickets in the queue
        self.started_at = self.idle_since = 0.0
        self.last_grant = -math.inf
        self.pause_began = None  # when it became idle; None while in use
        self.pauses = collections.deque(maxlen=8)
        self.evicted_for = None  # the model that needed its room, until that is ready
        self.load_seconds = self.stop_seconds = None
        self.last_failure = None
        self.is_released = False  # unloaded by hand: keep_loaded waits for a request
        self.is_asleep = False  # or stopping, and was asleep before
        self.retry_victim = None  # the model that must stop before a load is retried
        self.replacement = None  # the spec after a reload, once the backend has exited
        self.run = 0  # number of its current backend
        self.reset_failures()
        self.reset_run()

    def reset_failures(self):
        self.failures = 0
        self.retry_at = -math.inf
        self.keep_loaded_at = -math.inf  # after a crash, keep_loaded waits until then

    def reset_run(self):
        """Nothing runs; a reload that waited for that takes effect."""
        self.ready_at = -math.inf
        self.in_flight = 0
        self.preemptible = 0  # leases that no stop waits for
        self.idle_timeout = None  # set by a request; inf: never
        self.unload_by = None  # stopped by hand: no grants; leases are cut then
        self.stop_cause = None  # as in Stop; or sleep: it is to fall asleep
        self.drains_for = None  # the ticket that needs its room
        if self.replacement is not None:
            self.spec, self.replacement = self.replacement, None
            self.reset_failures()

    def advance(self, state: State, now: float):
        """Move to this state; a ValueError is a bug."""
        if state is not self.state:
            if state not in NEXT_STATES[self.state]:
                raise ValueError(f"{self.name}: {self.state} cannot become {state}")
            self.state, self.changed_at = state, now
        if state is not State.UNLOADING:  # which still holds what it held
            self.is_asleep = state is State.SLEEPING

    @property
    def is_held(self) -> bool:
        """Whether it has a backend, which may hold memory."""
        return self.state is not State.UNLOADED

    @property
    def is_down(self) -> bool:
        return self.state in (State.UNLOADED, State.SLEEPING)

    @property
    def is_idle(self) -> bool:
        return not (self.in_flight or self.waiting)

    @property
    def is_pinned(self) -> bool:
        """Whether nothing may evict it now."""
        was_ready = self.ready_at > -math.inf
        return self.spec.is_pinned or self.spec.is_pinned_once_loaded and was_ready

    @property
    def needs_room(self) -> bool:
        return bool(self.spec.is_local or self.spec.needs)

    @property
    def is_stopping_soon(self) -> bool:
        """Whether it drains for an unload by hand or a reload, and grants nothing."""
        return self.replacement is not None or self.unload_by is not None

    def serves(self, ticket: Ticket) -> bool:
        """Whether it is loaded or loads, and serves the ticket before it goes."""
        is_up = self.state in (State.LOADING, State.LOADED)
        is_younger = self.drains_for and self.drains_for.number < ticket.number
        return is_up and not (is_younger or self.is_stopping_soon)

    def usage(self) -> ModelUsage:
        """What it takes of the limits now."""
        if self.is_asleep:
            places = int(self.spec.is_local and not self.spec.can_sleep)
            return ModelUsage(self.name, places, self.spec.sleep_needs)
        return self.usage_when_loaded()

    def usage_when_loaded(self) -> ModelUsage:
        return ModelUsage(self.name, int(self.spec.is_local), self.spec.needs)

    def last_used(self) -> float:
        """When it was last granted, or became ready (by hand, for example)."""
        return max(self.last_grant, self.ready_at)

    def record_arrival(self, now: float):
        """A request arrived: the pause since the model became idle, if any, is over."""
        if self.pause_began is not None:
            self.pauses.append(now - self.pause_began)
            self.pause_began = None

    def record_idle(self, now: float):
        """A request ended, served or not; after the last one a pause begins."""
        self.idle_since = now
        if self.is_idle:
            self.pause_began = now

    def record_failure(self, problem: APIError, now: float):
        """A load failed; after FAILURES_TO_BACK_OFF the next one must wait."""
        self.last_failure = problem
        self.failures += 1
        if self.failures >= FAILURES_TO_BACK_OFF:
            surplus = min(self.failures - FAILURES_TO_BACK_OFF, 16)
            self.retry_at = now + min(MAX_BACKOFF, 2.0**surplus)

    def swap_cost(self, newcomer: "ModelState") -> float:
        """Seconds to stop this model, load the newcomer, and load this one again."""
        loads = [self.load_seconds, newcomer.load_seconds]
        cost = sum(seconds for seconds in loads + [self.stop_seconds] if seconds)
        if None in loads:
            cost = max(cost, UNKNOWN_SWAP_COST)
        return min(cost, MAX_PATIENCE)

    def return_gap(self, cost: float) -> float:
        """Seconds of silence after which its clients are not expected back soon."""
        short = [pause for pause in self.pauses if pause < cost / 4]
        if not short or 2 * len(short) < len(self.pauses):
            return MIN_RETURN_GAP
        return max(MIN_RETURN_GAP, 2 * max(short))

    def unload_at(self) -> float:
        """When its idle time ends; inf: it loads, is in use, or never unloads."""
        is_in_use = self.in_flight or self.waiting or self.preemptible
        is_exempt = self.spec.is_pinned or self.spec.keep_loaded
        if is_in_use or is_exempt or self.state is State.LOADING:
            return math.inf
        if self.idle_timeout is not None:
            return self.idle_since + self.idle_timeout
        return self.idle_since + (self.spec.idle_timeout or math.inf)


def choose_victims(
    candidates: Iterable[ModelState], makes_room: Callable[[FrozenSet], bool]
) -> Optional[FrozenSet[ModelState]]:
    """Return the candidates to evict, or None if even all of them make no room.

    No busy one before any idle ones, then the fewest, then the least recently used.
    After 256 choices (all of eight models, all pairs of twenty) they need not be the
    fewest, but none is superfluous.
    """
    by_age = sorted(candidates, key=ModelState.last_used)
    chosen = frozenset(by_age)
    if not makes_room(chosen):
        return None
    for is_idle in (False, True):
        models = [model for model in by_age if model.is_idle == is_idle]
        others = chosen.difference(models)
        choices = (
            others.union(choice)
            for size in range(len(models) + 1)
            for choice in itertools.combinations(models, size)
        )
        fewest = next(filter(makes_room, itertools.islice(choices, 256)), None)
        if fewest is None:
            for model in reversed(models):
                if makes_room(chosen - {model}):
                    chosen -= {model}
        else:
            chosen = fewest
    return chosen


class Scheduler:
    """Decides which models run and which tickets are served. See the banner above."""

    def __init__(self, limits: Limits, specs: Mapping[str, ModelSpec]):
        self.limits = limits
        self.models = {name: ModelState(name, spec) for name, spec in specs.items()}
        self.held = {}  # name -> ModelState, those that are not unloaded
        self._keep_loaded = [name for name, spec in specs.items() if spec.keep_loaded]
        self.is_keep_loaded_paused = False  # until the next request
        self._queue = {}  # number -> Ticket, oldest first
        self._numbers = itertools.count(1)
        self._runs = itertools.count(1)  # unique over all models
        self._decisions = []  # since the last decide(); events refuse tickets, too
        self._drain_count = 0  # how often a model began to drain for a ticket
        self._next_deadline = math.inf
        self._stopping = {}  # of one walk of the queue: ModelState -> when it stops
        self._pinned = []  # of one walk: ModelStates that nothing may evict
        self._closing_error = None  # refuses every ticket once closed

    # -- events: requests ------------------------------------------------------------

    def submit(self, name: str, now: float, **kind) -> Ticket:
        """Queue a request for the model; the next `decide` may grant or refuse it. For
        its `kind` see Ticket."""
        model = self.models[name]
        model.is_released = self.is_keep_loaded_paused = False
        ticket = Ticket(next(self._numbers), model, now, **kind)
        if ticket.manual:
            model.reset_failures()
        else:
            model.record_arrival(now)
        self._queue[ticket.number] = ticket
        model.waiting += 1
        return ticket

    def finish(self, ticket: Ticket, now: float):
        """The request has ended or its client has left. The ticket may be waiting,
        granted or refused, but no manual one; call it once."""
        model = ticket.model
        if ticket.number in self._queue:
            self._dequeue(ticket)
        elif ticket.run != model.run or not model.is_held:
            return  # refused, or the lease ended with its backend
        elif ticket.preemptible:
            model.preemptible -= 1
        else:
            model.in_flight -= 1
        model.record_idle(now)

    def choose(self, names: Sequence[str]) -> ModelState:
        """Return the model that can serve a request soonest, the first if none is
        loaded."""
        for state in SOONEST_FIRST:
            for model in map(self.models.get, names):
                is_leaving = model.is_stopping_soon or model.drains_for
                if model.state is state and not is_leaving:
                    return model
        return self.models[names[0]]

    def keep_alive(self, name: str, seconds: float):
        """Set the idle timeout of a model until it unloads; below 0: never unload."""
        self.models[name].idle_timeout = seconds if seconds >= 0 else math.inf

    # -- events: backends ------------------------------------------------------------

    def loaded(self, name: str, run: int, now: float):
        """The backend is ready: loaded, or awake again."""
        model = self._current(name, run)
        if model is None:
            return
        if model.state is State.UNLOADING:  # it woke by itself, but is to stop
            model.is_asleep = False
            return
        if model.state is State.LOADING:
            if model.started_at > -math.inf:
                model.load_seconds = now - model.started_at
            model.ready_at = model.idle_since = now
            model.last_grant = -math.inf
            model.reset_failures()
            model.last_failure = model.retry_victim = None
            for victim in self.models.values():
                if victim.evicted_for is model:
                    # its next request is no quick return: a client that alternates
                    # between both models may have caused this load
                    victim.evicted_for = None
                    victim.record_arrival(math.inf)
        model.advance(State.LOADED, now)

    def crashed(self, name: str, run: int, now: float):
        """The loaded backend is ending by itself; `exited` follows."""
        model = self._current(name, run)
        if model is not None and model.state in (State.LOADED, State.SLEEPING):
            model.advance(State.UNLOADING, now)

    def adopted(self, name: str, now: float) -> int:
        """The backend already runs; `loaded` follows. Return its run."""
        model = self.models[name]
        model.is_released = False
        self._begin_run(model, now)
        model.started_at = -math.inf  # unknown
        return model.run

    def slept(self, name: str, run: int, now: float):
        """The backend sleeps, after a Stop or by itself."""
        model = self._current(name, run)
        if model is None or model.state is State.LOADING:
            return  # reported before it was told to wake
        if model.state is State.UNLOADING:
            if model.stop_cause != "sleep":
                return  # fell asleep by itself, but is to stop
            model.stop_seconds = now - model.changed_at
            model.stop_cause = model.drains_for = None
        model.advance(State.SLEEPING, now)

    def exited(
        self, name: str, run: int, now: float, failure: Optional[APIError] = None
    ) -> Optional[str]:
        """The backend has exited and holds nothing. `failure`: why, if by itself.

        A load that ran out of memory beside other models is retried once, after the
        least recently used of them has stopped: then its name is returned.
        """
        model, victim = self._current(name, run), None
        if model is None:
            return None
        if model.stop_cause:  # it was told to stop
            model.stop_seconds = now - model.changed_at
        elif model.state is State.LOADING:
            failure = failure or APIError(f"{name} ended while it was loading")
            victim = model.retry_victim = self._choose_retry_victim(model, failure)
            if victim is None:
                model.record_failure(failure, now)
                self._refuse_waiting(name, failure)
        elif failure is not None:
            model.last_failure = failure
            model.keep_loaded_at = model.ready_at + MAX_BACKOFF
        else:  # stopped by other means than llmswap
            model.is_released = True
        model.advance(State.UNLOADED, now)
        del self.held[name]
        model.reset_run()
        return victim and victim.name

    def _choose_retry_victim(self, model, failure):
        """Return the model to stop before a retry of the load; None: no retry."""
        is_first = not model.retry_victim and failure.is_out_of_memory
        if not (is_first and model.needs_room and model.waiting):
            return None
        candidates = (each for each in self.held.values()
                      if each is not model and self._is_evictable(each))
        return min(candidates, key=ModelState.last_used, default=None)

    def learn(self, name: str, needs: Mapping[str, int]):
        """The model needs this much, as measured or estimated.

        Needs of a running model grow only as far as the budget has room beside all
        others. Call it again when one of those has exited.
        """
        model = self.models[name]
        if model.replacement is not None:
            model.replacement = model.replacement._replace(needs=needs)
            return
        if model.is_held and not model.is_asleep:
            for each, left in self.left_beside(name).items():
                ceiling = max(left, model.spec.needs.get(each, 0))
                needs = {**needs, each: min(needs.get(each, 0), ceiling)}
        model.spec = model.spec._replace(needs=needs)

    def left_beside(self, name: str) -> Dict[str, int]:
        """Return what all models that are held but this one leave of the budget."""
        held = [each.usage().needs for each in self.held.values() if each.name != name]
        return {
            each: size - sum(needs.get(each, 0) for needs in held)
            for each, size in self.limits.budget.items()
        }

    def _current(self, name, run):
        """The model if this is its current run; None if the event comes too late."""
        model = self.models[name]
        return model if model.run == run and model.is_held else None

    # -- events: operators -----------------------------------------------------------

    def unload(self, name: str, now: float, problem: APIError) -> bool:
        """Stop a model by hand and refuse its tickets; False if it is not loaded.

        Requests in flight have its stop timeout to end, then the backend is stopped.
        keep_loaded has no effect on it until its next request or a reload.
        """
        self.models[name].is_released = True
        return self._unload(name, now, problem)

    def unload_all(self, now: float, problem: APIError):
        """Stop every model as if by hand; keep_loaded has no effect until the next
        request for any of them."""
        self.is_keep_loaded_paused = True
        for name in self.models:
            self._unload(name, now, problem)

    def _unload(self, name, now, problem):
        model = self.models[name]
        self._refuse_waiting(name, problem)
        if model.is_held and model.unload_by is None:
            model.unload_by = now + model.spec.stop_timeout
        return model.is_held

    def configure(
        self, limits: Limits, specs: Mapping[str, ModelSpec], changed: Sequence[str]
    ):
        """Take over a new configuration.

        Backends in `changed` drain and are replaced. Those not in `specs` drain and
        stop; their tickets, also later ones, are refused. No lease is cut.
        """
        self.limits = limits
        self._keep_loaded = [name for name, spec in specs.items() if spec.keep_loaded]
        for name in self.models.keys() - specs.keys():
            problem = ModelNotFound(f"{name!r} is no longer in the configuration")
            specs = {**specs, name: ModelSpec(problem=problem)}
            changed = [*changed, name]
        for name, spec in specs.items():
            model = self.models.setdefault(name, ModelState(name, spec))
            if model.is_held and (name in changed or model.replacement):
                model.replacement = spec
            else:
                model.spec = spec
                if name in changed:
                    model.reset_failures()
            model.is_released = False
            if model.is_pinned:
                model.drains_for = None

    def _refuse_waiting(self, name, problem):
        for ticket in list(self._queue.values()):
            if ticket.model.name == name:
                self._refuse(ticket, problem)

    def close(self, problem: APIError):
        """From now on `decide` refuses every ticket, waiting or new."""
        self._closing_error = problem

    # -- counts ----------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """How many tickets wait."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """How many leases there are that are not preemptible."""
        return sum(model.in_flight for model in self.held.values())

    # -- decisions -------------------------------------------------------------------

    def decide(self, now: float) -> Tuple[List[NamedTuple], float]:
        """Return the decisions, to be carried out in order, and the next deadline."""
        steps = self._serve_queue, self._stop_models, self._start_keep_loaded
        done = 0  # of the steps; a decision or a drain may make others possible
        while done < len(steps):
            before = len(self._decisions) + self._drain_count
            steps[done](now)
            is_same = len(self._decisions) + self._drain_count == before
            done = done + 1 if is_same else 0
        decisions, self._decisions = self._decisions, []
        return decisions, self._next_deadline

    def _look_again_at(self, moment):
        self._next_deadline = min(self._next_deadline, moment)

    def _serve_queue(self, now):
        """Walk the queue once."""
        self._next_deadline = math.inf
        if not self._queue:
            return
        self._stopping = {
            model: -math.inf for model in self.held.values()
            if model.state is State.UNLOADING or model.is_stopping_soon
            or model.drains_for
        }
        self._pinned = [
            model for model in self.held.values()
            if model.is_pinned and model not in self._stopping
        ]
        wanted = {}  # name -> usage that this ticket and older ones wait for
        waiting, is_full = 0, False  # is_full: `wanted` alone exceeds the limits
        for ticket in list(self._queue.values()):
            model = ticket.model
            is_first = model.name not in wanted
            if is_first and self._may_grant(ticket):
                self._grant(ticket, now)
                continue
            problem = self._refusal_of(ticket, waiting, now)
            if problem is not None:
                self._refuse(ticket, problem)
                continue
            waiting += 1
            if is_first:
                wanted[model.name] = model.usage_when_loaded()
                is_full = is_full or not self.limits.allow(wanted.values())
                self._try_start(ticket, wanted, is_full, now)

    def _may_grant(self, ticket):
        model, limit = ticket.model, ticket.model.spec.concurrency
        is_ready = model.state is State.LOADED and model.serves(ticket)
        if not is_ready or self._closing_error or model.spec.problem:
            return False
        return not limit or model.in_flight < limit or ticket.preemptible

    def _refusal_of(self, ticket, waiting, now):
        """Return why a ticket may not wait any longer, or None."""
        model, limits = ticket.model, self.limits
        problem = self._closing_error or (model.replacement or model.spec).problem
        if problem:
            return problem
        if limits.queue_timeout:
            ends = ticket.arrived + limits.queue_timeout
            if now >= ends:
                waited = f"waited {limits.queue_timeout:g} s for {model.name!r}"
                return QueueTimeout(f"{waited} (queue-timeout in [llmswap])")
            self._look_again_at(ends)
        if ticket.load_refusal and not model.serves(ticket):
            return ticket.load_refusal
        if not model.is_held and model.spec.is_local and now < model.retry_at:
            seconds = max(1, math.ceil(model.retry_at - now))
            text = f"{model.last_failure}\n(it is tried again in {seconds} s)"
            return LoadBackoff(text, retry_after=seconds)
        pins = [pin for pin in self._pinned if pin is not model]
        needed = [model.usage_when_loaded(), *(pin.usage() for pin in pins)]
        is_hindered = pins and model.is_down and model.needs_room
        if is_hindered and not self.limits.allow(needed):
            names = ", ".join(sorted(pin.name for pin in pins))
            text = f"{model.name!r} does not fit beside the pinned {names}"
            return ModelPinned(f"{text}: unloading by hand makes room")
        is_full = limits.queue_max and waiting >= limits.queue_max
        full = f"{limits.queue_max} requests wait already (queue-max in [llmswap])"
        return QueueFull(full) if is_full else None

    def _grant(self, ticket, now):
        model = ticket.model
        self._dequeue(ticket)
        ticket.run = model.run
        if ticket.manual:
            model.record_idle(now)
        else:
            model.last_grant = now
            if ticket.preemptible:
                model.preemptible += 1
            else:
                model.in_flight += 1
        self._decisions.append(Grant(ticket))

    def _refuse(self, ticket, problem):
        self._dequeue(ticket)
        self._decisions.append(Refuse(ticket, problem))

    def _dequeue(self, ticket):
        del self._queue[ticket.number]
        ticket.model.waiting -= 1
        if not ticket.model.waiting:
            ticket.model.retry_victim = None
        self._spare_victims(ticket)

    def _spare_victims(self, ticket):
        for model in self.held.values():
            if model.drains_for is ticket:
                model.drains_for = None

    def _try_start(self, ticket, wanted, is_full, now):
        """Start the ticket's model, or make room for it, or wait for room."""
        model = ticket.model
        if not model.is_down or model.is_stopping_soon or model.drains_for:
            return
        if not model.needs_room:
            self._start(model, now, ticket)
        elif is_full or self._awaits_retry(ticket):
            return
        elif not self._fits(wanted, self._stopping):
            self._evict(ticket, wanted, now)
        elif self._fits({model.name: wanted[model.name]}):
            self._start(model, now, ticket)

    def _awaits_retry(self, ticket):
        """Whether its model waits for the retry of a load that ran out of memory: its
        own, until the retry victim has drained, or the load whose victim it was."""
        for model in self.held.values():
            if model.retry_victim is ticket.model and model.state is State.LOADING:
                return True
        victim = ticket.model.retry_victim
        if victim is None or victim.is_down:
            return False
        if victim not in self._stopping and self._is_evictable(victim):
            victim.drains_for = ticket
            self._drain_count += 1
            self._stopping[victim] = -math.inf
        return victim in self._stopping

    def _fits(self, wanted, stopping=frozenset()):
        """Whether `wanted` fits beside all that is held, except what is stopping."""
        staying = (each.usage() for each in self.held.values()
                   if each.name not in wanted and each not in stopping)
        return self.limits.allow([*wanted.values(), *staying])

    def _start(self, model, now, ticket=None):
        is_wake = model.state is State.SLEEPING
        self._begin_run(model, now)
        self._spare_victims(ticket)
        self._decisions.append(Start(model.name, model.run, is_wake))

    def _begin_run(self, model, now):
        if not model.is_held:  # waking continues the run
            model.run = next(self._runs)
            self.held[model.name] = model
        model.advance(State.LOADING, now)
        model.started_at = now

    def _evict(self, ticket, wanted, now):
        """Choose victims for the ticket; they drain once patience ends."""
        candidates = [
            model for model in self.held.values()
            if model.name not in wanted and model not in self._stopping
            and self._is_evictable(model)
        ]
        victims = choose_victims(
            candidates, lambda chosen: self._fits(wanted, chosen.union(self._stopping))
        )
        if victims is None:
            return  # a pinned or reserved model is in the way
        moment = max(self._evictable_at(ticket, victim, now) for victim in victims)
        stopped_by_then = (m for m, at in self._stopping.items() if at <= moment)
        demand = {ticket.model.name: wanted[ticket.model.name]}
        if not self._fits(demand, victims.union(stopped_by_then)):
            moment = max([moment, *self._stopping.values()])
        self._stopping.update(dict.fromkeys(victims, moment))
        if moment > now:
            self._look_again_at(moment)
            return
        for victim in victims:
            victim.drains_for = ticket
            self._drain_count += 1

    def _is_evictable(self, model):
        if model.is_pinned or not model.needs_room:
            return False
        if model.state is State.SLEEPING and model.spec.can_sleep:
            return bool(model.spec.sleep_needs)
        is_new = model.state is State.LOADED and model.last_grant < model.ready_at
        is_reserved = model.waiting and (is_new or model.state is State.LOADING)
        return not is_reserved

    def _evictable_at(self, ticket, victim, now):
        """When the victim may begin to drain for the ticket."""
        if victim.state is not State.LOADED:
            return now  # sleeping, or loading without a ticket that waits for it
        cost = victim.swap_cost(ticket.model)
        patience = cost if self.limits.patience is None else self.limits.patience
        moment = max(ticket.arrived, victim.ready_at) + patience
        if victim.is_idle:
            moment = min(moment, victim.idle_since + victim.return_gap(cost))
        return moment

    def _start_keep_loaded(self, now):
        """If no ticket waits, start the keep_loaded models that fit. A later ticket
        that needs the room stops such a load at once."""
        if self._queue or self._closing_error or self.is_keep_loaded_paused:
            return
        for model in map(self.models.get, self._keep_loaded):
            is_wanted = model.spec.keep_loaded and not model.is_released
            # one that fell asleep by itself wakes by itself
            is_missing = model.is_down and (model.spec.can_sleep or not model.is_held)
            if not (is_wanted and is_missing):
                continue
            if self._fits({model.name: model.usage_when_loaded()}):
                moment = max(model.retry_at, model.keep_loaded_at)
                if now >= moment:
                    self._start(model, now)
                else:
                    self._look_again_at(moment)

    def _stop_models(self, now):
        """Stop every model that has drained or idled long enough."""
        for model in self.held.values():
            cause, moment = self._stop_due(model)
            if now < moment:
                self._look_again_at(moment)
                continue
            newcomer, to_sleep = None, False
            if cause in ("evicted", "abandoned"):
                model.evicted_for = model.drains_for.model
                newcomer = model.evicted_for.name
                to_sleep = model.spec.can_sleep and model.state is State.LOADED
            model.advance(State.UNLOADING, now)
            model.stop_cause = "sleep" if to_sleep else cause
            stop = Stop(model.name, model.run, cause, newcomer, to_sleep)
            self._decisions.append(stop)

    def _stop_due(self, model):
        """Return why the model is to be stopped, and when; inf: not for now."""
        once_drained = math.inf if model.in_flight else -math.inf
        if model.state is State.UNLOADING:
            return None, math.inf
        if model.unload_by is not None:
            cause = "shutdown" if self._closing_error else "unload"
            return cause, min(model.unload_by, once_drained)
        if model.replacement is not None:
            return "reload", once_drained
        if model.drains_for:
            is_loading = model.state is State.LOADING
            return "abandoned" if is_loading else "evicted", once_drained
        return "idle", model.unload_at()


# ==================================================================================
# 4  Backends: one run of one model server, from its start to its end.
#    Never knows the Scheduler, the Pool, clients or other models.
#
#        _spawn ──> _await_healthy ──> what is asked of it ──> _terminate
#            │          on_loaded ──┘     │ on_slept, on_dying     │
#            └── exit, stop or timeout ───┴─────────── on_exited ──┘
#
#    Each backend has a thread of its own, `_run`. Other threads set a flag and wake it.
# ==================================================================================

POLL_INTERVAL = 0.5  # s between two checks that a silent client is still connected
HEALTH_TIMEOUT = 5.0  # s; a health check that is not answered by then is repeated
IDLE_CONNECTIONS = 16  # kept to one backend
MAX_WAIT = 2000000.0  # s; poll(), which has milliseconds, takes no much longer timeout
MAX_LINE = 16384  # bytes; a longer one is cut into several
PIPE_SIZE = 65536  # bytes, of Linux
LOOPBACK = ("127.0.0.1", "localhost", "::1")
NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 4, 20  # of Linux's sock_diag(7)
NETLINK_DUMP, LISTENING = 0x301, 1 << 10  # of netlink(7) and tcp_states.h
PORT_TRIES = 3
LOOK_AT_LOADS = 0.2  # s between two looks at what a load has read


_recent_ports = collections.deque(maxlen=100)  # their servers may not listen yet


def free_port() -> int:
    """Return a free port on loopback, if possible outside the ephemeral range, and none
    that was returned a short while ago."""
    text = read_text_or_empty("/proc/sys/net/ipv4/ip_local_port_range")
    low = max(10050, int((text.split() or ["32768"])[0]))
    ports = random.sample(range(10000, low), 50)
    for port in [*(each for each in ports if each not in _recent_ports), 0]:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _recent_ports.append(port)
            return probe.getsockname()[1]
    raise LoadFailed("no free port was found on 127.0.0.1")


def start_thread(target, name: str, *args) -> threading.Thread:
    """Start a thread that does not keep llmswap from ending."""
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    thread.start()
    return thread


def read_text_or_empty(path):
    """Return the text of a file, or "" if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read())
    except OSError:
        return ""


# -- listeners and processes -----------------------------------------------------------


def listening_inodes(port: int) -> Set[int]:
    """Return the inodes of the sockets to which 127.0.0.1:`port` may lead; none where
    the kernel does not tell, so that any listener is believed.

    Asked directly: to write its tables into /proc takes the kernel 20 ms and more.
    """
    inodes = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        query = struct.pack(
            "=IHH8xBB2xIH46x", 72, SOCK_DIAG_BY_FAMILY, NETLINK_DUMP,
            family, socket.IPPROTO_TCP, LISTENING, socket.htons(port),
        )
        with contextlib.suppress(AttributeError, OSError), socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG
        ) as kernel:
            kernel.settimeout(1.0)
            kernel.send(query)
            data = kernel.recv(65536)
            while SOCK_DIAG_BY_FAMILY in data[4:6]:  # the last message is another
                address = data[24:40]
                is_loopback = b"\x7f\0\0\1" in (address[:4], address[12:])
                if is_loopback or not any(address):
                    inodes.update(struct.unpack_from("=I", data, 84))
                (size,) = struct.unpack_from("=I", data)
                data = data[(size + 3) & ~3 :] or kernel.recv(65536)
    return inodes


def holder_of(inode: int, likely: Iterable[int]) -> Optional[int]:
    """Return a process that has this socket open, `likely` ones first, or None."""
    target = f"socket:[{inode}]"
    for pid in itertools.chain(likely, processes()):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            with os.scandir(f"/proc/{pid}/fd") as entries:
                if any(os.readlink(entry.path) == target for entry in entries):
                    return pid
    return None


# What /proc says of a process: `start` in ticks since boot, `resident` in pages.
ProcessStat = namedtuple("ProcessStat", "state group session flags start resident")
PF_EXITING = 4  # among the flags: it is ending


def process_stat(pid: Optional[int]) -> Optional[ProcessStat]:
    """Return what /proc says of the process, or None if there is none."""
    fields = read_text_or_empty(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if not fields:
        return None
    return ProcessStat(fields[0], *(int(fields[at]) for at in (2, 3, 6, 19, 21)))


def processes() -> List[int]:
    """Return all processes there are; none without /proc."""
    with contextlib.suppress(OSError):  # not Linux, or no descriptor is left
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return []


def group_members(group: Optional[int]) -> Set[int]:
    """Return the processes of a process group, the dead that are not reaped, too."""
    members = set()
    for pid in processes():
        with contextlib.suppress(OSError):
            if os.getpgid(pid) == group:
                members.add(pid)
    return members


def process_name(pid: int) -> str:
    """Return the number and the name of a process, for people."""
    name = read_text_or_empty(f"/proc/{pid}/comm").strip() or "?"
    return f"process {pid} ({name})"


def foreign_listener(inodes: Set[int], child: int, may_hide: bool) -> Optional[str]:
    """Return the name of a process outside the child's session that has a listener.

    `may_hide`: the listener may belong to another process (a container engine) if it
    cannot be seen or is not older than the child. If not even the child's own sockets
    can be seen, any listener is believed.
    """
    child_stat = process_stat(child)
    if child_stat is None:  # the child has ended and was reaped meanwhile
        return "another process" if inodes else None
    may_hide = may_hide and child_stat.state not in "ZX"  # the dead have no listener
    for inode in inodes:
        holder = holder_of(inode, [child])
        owner = process_stat(holder)
        if owner is None:
            if not may_hide and os.access(f"/proc/{child}/fd", os.R_OK):
                return "a process of another user"
        elif child_stat.session != owner.session:
            if not may_hide or owner.start < child_stat.start:
                return process_name(holder)
    return None


# -- connections to a backend ----------------------------------------------------------


def suspended_seconds() -> float:
    """Return how long this machine has been suspended since it was booted."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)  # runs on while the machine sleeps
    return time.clock_gettime(clock) - time.monotonic() if clock else 0.0


class Upstream:
    """Where a backend listens, and the connections to it, which time out after
    POLL_INTERVAL and do not outlive a suspension. Any thread may call."""

    def __init__(self, url: str):
        parts = urllib.parse.urlsplit(url)
        self.host = parts.hostname or "127.0.0.1"
        self.is_tls = parts.scheme == "https"
        self.port = parts.port or (443 if self.is_tls else 80)
        self.authority = parts.netloc.rpartition("@")[2]
        self.base_path = parts.path.rstrip("/")
        self._idle = collections.deque(maxlen=IDLE_CONNECTIONS)  # drops the oldest
        self._active = set()
        self._is_closed, self._tls = False, None
        self.mark_alive()

    @property
    def is_busy(self) -> bool:
        """Whether a request uses a connection now."""
        return bool(self._active)

    def mark_alive(self):
        """The backend gave a sign of life just now, such as a part of an answer."""
        self._seen_at, self._suspended = time.monotonic(), suspended_seconds()

    def seen_within(self, seconds: float) -> bool:
        """Whether its last sign of life is no older, nor from before a suspension."""
        has_slept = suspended_seconds() > self._suspended + 1.0
        return not has_slept and time.monotonic() < self._seen_at + seconds

    def dial(self, timeout: float) -> socket.socket:
        """Return a new connection, which is not counted. Raise OSError."""
        sock = socket.create_connection((self.host, self.port), timeout=timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self.is_tls:
            return sock
        import ssl

        self._tls = self._tls or ssl.create_default_context()
        names = {"server_hostname": self.host, "suppress_ragged_eofs": False}
        return self._tls.wrap_socket(sock, **names)

    def connect(self) -> Tuple[socket.socket, bool]:
        """Return a connection and whether it was used before. Raise OSError."""
        with contextlib.suppress(IndexError):  # when no idle one is left
            while True:
                sock, suspended = self._idle.pop()
                is_stale = suspended_seconds() > suspended + 1.0
                has_input = getattr(sock, "pending", int)()  # the rest of a TLS record
                if not (is_stale or has_input or await_event(sock, select.POLLIN, 0)):
                    return self._count(sock), True
                sock.close()  # the backend has closed it, or sent bytes unasked
        sock = self.dial(10.0)
        sock.settimeout(POLL_INTERVAL)
        if not self.is_tls:
            set_socket_timeouts(sock)
        return self._count(sock), False

    def _count(self, sock):
        self._active.add(sock)
        if self._is_closed:
            self.drop(sock)
            raise ConnectionAbortedError("the backend is being stopped")
        return sock

    def release_connection(self, sock: socket.socket):
        """Take back a connection on which a whole answer was read."""
        self._active.discard(sock)
        self._idle.append((sock, self._suspended))
        if self._is_closed:  # perhaps since this moment
            self.close()

    def drop(self, sock: socket.socket):
        """Close a connection for good; the backend notices and stops generating."""
        self._active.discard(sock)
        sock.close()

    def close(self):
        """Close what is idle and cut what is not; no more connections are made."""
        self._is_closed = True
        cut(self._active)
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop()[0].close()


def cut(sockets: Iterable[socket.socket]):
    """Shut connections down, which wakes their readers, as a close() would not."""
    for sock in list(sockets):
        with contextlib.suppress(OSError):  # it broke already
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # TLS's own wakes none


def set_socket_timeouts(sock: socket.socket):
    """Let reads and writes block for POLL_INTERVAL at most, without a poll for each."""
    sock.settimeout(None)
    interval = struct.pack("ll", 0, int(POLL_INTERVAL * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, interval)


def await_event(file, event: int, seconds: float) -> bool:
    """Return whether an event of select.poll() comes within so many seconds."""
    waiter = select.poll()
    waiter.register(file, event)
    return bool(waiter.poll(seconds * 1000))


# -- the guard -------------------------------------------------------------------------

# Reads "+ PGID" and "- PGID"; at the end of its input llmswap is dead: TERM, then KILL.
GUARD_SCRIPT = r"""
trap '' TERM INT HUP QUIT
groups=
while read -r sign group; do
  rest=
  for each in $groups; do [ "$each" = "$group" ] || rest="$rest $each"; done
  groups=$rest
  [ "$sign" = - ] || groups="$groups $group"
done
for group in $groups; do kill -s TERM -- "-$group"; done
[ -z "$groups" ] || sleep 0.5
for group in $groups; do kill -s KILL -- "-$group"; done
"""

# The child tells the guard its group before it becomes the model server, so there is no
# moment at which the server runs and the guard does not know it.
SPAWN_SCRIPT = r"""
echo "+ $$" >&0
{ echo "$1" >/proc/self/oom_score_adj; } 2>/dev/null || [ ! -e /proc/self ] ||
  echo "llmswap: oom-score-adj $1 was refused"
ulimit -Sn "$2"
shift 2
exec "$@" </dev/null
"""

OUR_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # before we raise it
DESCRIPTORS = "unlimited" if OUR_LIMIT == resource.RLIM_INFINITY else str(OUR_LIMIT)


class Guard:
    """A process that kills what is left of our children should we be killed.

    Its input is a pipe of which we keep both ends, so that a new guard can take over
    from a dead one. Any thread may call.
    """

    def __init__(self):
        self._read_end = self.fd = None  # until the first start
        self._lock = threading.Lock()  # of the process and the groups
        self._groups = set()
        self._process = None

    def start(self):
        """Start the guard unless it runs, and tell it every group. Raise OSError."""
        with self._lock:
            if self._process and self._process.poll() is None:
                return
            if self.fd is None:
                self._read_end, self.fd = os.pipe()
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", GUARD_SCRIPT, "llmswap-guard"],
                stdin=self._read_end,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
            for group in self._groups:
                self._tell("+", group)

    def _tell(self, sign, group):
        os.write(self.fd, f"{sign} {group}\n".encode())

    def spawn(self, argv: List[str], **options) -> subprocess.Popen:
        """Start a process in a group of its own, which the guard, started anew if it is
        dead, is responsible for. Raise OSError."""
        self.start()
        process = subprocess.Popen(argv, start_new_session=True, **options)
        with self._lock:
            self._groups.add(process.pid)
            self._tell("+", process.pid)
        return process

    def forget(self, group: int):
        """The group is dead; its number may soon be another's."""
        with self._lock:
            self._groups.discard(group)
            self._tell("-", group)

    def close(self):
        """Kill the groups that are left, and end the guard."""
        for group in [*self._groups]:
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        if self._process:
            self._process.kill()
            self._process.wait()


GUARD = Guard()


# -- before a start --------------------------------------------------------------------


def clean_environment(extra: Mapping[str, str]) -> Dict[str, str]:
    """Return our environment without what is meant for us alone, and with `extra`."""
    foreign = re.compile(
        "LISTEN_|WATCHDOG_|LLMSWAP_|(NOTIFY_SOCKET|JOURNAL_STREAM|LLAMA_API_KEY"
        "|LLAMA_SERVER_ROUTER_PORT)$"
    )
    ours = os.environ.items()
    inherited = {name: value for name, value in ours if not foreign.match(name)}
    return {**inherited, **extra}


def find_program(name: str, environment: Mapping[str, str], cwd: Optional[str]) -> str:
    """Return the path of the program as the child will find it. Raise LoadFailed."""
    base, path = cwd or "", environment.get("PATH", os.defpath)
    place = os.path.join(base, name) if os.sep in name else name
    folders = [os.path.join(base, folder) for folder in path.split(os.pathsep)]
    program = shutil.which(place, path=os.pathsep.join(folders))
    if program:
        return program
    if os.sep in name:
        reason = "is not executable" if os.path.exists(place) else "does not exist"
        raise LoadFailed(f"{place} {reason}")
    other = "`llama-server` in [llmswap], or " if name == "llama-server" else ""
    raise LoadFailed(
        f"there is no program {name!r} on the PATH; {other}the model's `cmd` can "
        "name its whole path"
    )


def run_command(argv: List[str], timeout: float, until=lambda: False, **more):
    """Run a command for at most so many seconds, or until `until()`; `more` goes to
    Popen. Return its status (None: it was killed, or cannot run) and its output."""
    runtime = {"XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}"}  # cron does not set it
    options = {
        "env": {**runtime, **clean_environment({})},
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.DEVNULL,
        **more,
    }
    deadline = time.monotonic() + timeout
    try:
        process = GUARD.spawn(argv, **options)
    except OSError as error:
        return None, f"{argv[0]}: {error.strerror}"
    output = None
    with process.stdout:
        while output is None:
            is_over = process.poll() is not None or time.monotonic() >= deadline
            try:
                output, _ = process.communicate(timeout=0.1)
            except subprocess.TimeoutExpired as error:
                if is_over or until():  # what it started may hold its output open
                    output = error.output or b""
    status = process.poll()
    if status is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    GUARD.forget(process.pid)
    return status, output.decode("utf-8", "replace").strip()


_options_locks = {}  # by path: the lock that is held while that binary is asked
_options = {}  # by its path, size and time: the options, and when to ask again
ASK_AGAIN_AFTER = 60.0  # s; for the options of a binary that did not answer in time


def options_of(binary: str) -> OptionTable:
    """Return the options that this llama-server says it has, else UNKNOWN_OPTIONS. It
    is asked once for each version of the file, 10 s at most; again after a while if it
    did not answer in time. Any thread may call."""
    try:
        path = find_program(binary, os.environ, None)
        file = os.stat(path)
    except (LoadFailed, OSError):
        return UNKNOWN_OPTIONS
    key = path, file.st_size, file.st_mtime_ns
    with _options_locks.setdefault(path, threading.Lock()):
        options, ask_again_at = _options.get(key, (UNKNOWN_OPTIONS, 0.0))
        if time.monotonic() >= ask_again_at:
            ours = clean_environment({}).items()
            env = {n: text for n, text in ours if not n.startswith("LLAMA_ARG_")}
            status, text = run_command([path, "--help"], 10.0, env=env)
            if status is None:
                ask_again_at = time.monotonic() + ASK_AGAIN_AFTER
            else:
                options, ask_again_at = parse_help(text) or UNKNOWN_OPTIONS, math.inf
            _options[key] = options, ask_again_at
        return options


def cached_models(binary: str) -> Optional[List[str]]:
    """Return llama.cpp's downloads, each as user/repo:TAG; None if the binary does not
    tell. It takes 10 s at most."""
    status, text = run_command([binary, "--cache-list"], 10.0)
    return re.findall(r"(?m)^ *\d+\. (\S+)$", text) if status == 0 else None


def table_of(model: Model) -> Optional[OptionTable]:
    """Return the options that the model's llama-server has; None for other kinds."""
    is_llama = model.kind == "llama-server"
    return options_of(model.settings.llama_server) if is_llama else None


def check_start(model: Model):
    """Raise LoadFailed if a start of the model is bound to fail. Reads the disk."""
    try:
        check_files(model, model.command(table_of(model), "0"))
    except ConfigError as error:
        raise LoadFailed(str(error)) from None


def check_files(model: Model, argv: Sequence[str]):
    """Raise LoadFailed if the program or a file of a llama-server is missing."""
    if not argv:
        return
    cwd = model.settings.cwd
    if cwd and not os.path.isdir(cwd):
        raise LoadFailed(f"{cwd} is not a folder (cwd)")
    words = itertools.dropwhile(lambda w: w == "env" or ASSIGNMENT.match(w), argv)
    program = next(words, "env")
    if program.startswith("-") or any(word.startswith("PATH=") for word in argv):
        program = argv[0]  # only env(1) knows what it will run
    find_program(program, clean_environment(model.environment("0")), cwd)
    if model.kind == "llama-server":
        for option, path in zip(argv, argv[1:]):
            is_file = option in ("--model", "--mmproj", "--model-draft")
            if is_file and not os.path.exists(os.path.join(cwd, path)):
                raise LoadFailed(f"{path} does not exist (option {option})")


# -- a backend -------------------------------------------------------------------------

CONNECT_TIMEOUT = 1.0  # s; a host that has not accepted by then sleeps, or is gone
SLEEP_TIMEOUT = 60.0  # s; a backend that has not fallen asleep by then is stopped
SLEEP_POLL = 5.0  # s between looks at a llama-server that may put itself to sleep
DEATH_TIMEOUT = 5.0  # s for a process that ends to be dead, and to tell why
WAKE_REQUEST = ("GET", "/lora-adapters", "")  # the cheapest that wakes a llama-server
MAX_CONTROL_ANSWER = 1 << 22  # bytes
MALFORMED = (  # what reading a JSON document of another shape may raise
    AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError
)


class Probe(NamedTuple):
    """The outcome of one control request: an HTTP status and body, or an error."""

    status: Optional[int] = None
    body: bytes = b""
    error: Optional[Exception] = None

    @property
    def ok(self) -> bool:
        return self.status == 200

    @property
    def timed_out(self) -> bool:
        return isinstance(self.error, (TimeoutError, socket.timeout))

    @property
    def reason(self) -> str:
        """Return why it is not ok, for people."""
        if self.error is None:
            return f"it answers {self.status}"
        return "no answer in time" if self.timed_out else str(self.error)


class Backend:
    """One run of a model's server, on a thread of its own (`_run`).

    Its listener has a method for each event, called on that thread (`on_line` on any)
    with the backend before these arguments:

        on_progress(is_new)   it loads; whether its `progress` has changed
        on_loaded()           it is ready, or awake again
        on_described(entry)   then: the entry of its own /v1/models, {} if it has none
        on_slept()            it fell asleep
        on_dying()            it was found dead or hung, though not told to stop
        on_exited(problem)    nothing of it is left; problem None if it was stopped
        on_line(text)         it wrote a line, or something is to be said of it
        on_context(kind, tokens, size, seconds)   see LlamaServerBackend

    Subclasses implement `_spawn`, which raises APIError, and sets `_exited` once it
    ends by itself; `_terminate`, which returns once nothing of it is left; `_failure`,
    which returns the APIError that tells why it ended by itself, or None.
    """

    pid = None  # of its main process, once known
    lines = ()  # the last that it wrote, where they are read here
    progress = None  # of a load, from 0 to 1, where that can be told
    refusal = None  # the last answer to a health check of the load, for people
    _problem = None  # why it ended by itself
    _silent_since = None  # when a request was first found silent
    _stranger = None  # the process that has its port, for people
    _sleep_poll, _is_asleep = None, False
    _is_ready = _is_stop_asked = _is_kill_asked = False
    _is_saving = False  # its context, though it is asked to stop

    def __init__(self, model: Model, listener, settle_timeout: float):
        is_child = model.kind in ("llama-server", "cmd")  # it has no place yet
        location = "" if is_child else model.settings.unit or model.url("")
        self.model = model
        self.upstream = Upstream(model.url("")) if location else None
        self.port = self.upstream and self.upstream.port
        self.location = location  # pid and port, unit or URL, for people
        self.started_at = time.monotonic()
        self._listener = listener
        self._settle_timeout = settle_timeout
        self._title = f"{model.name} ({location})" if location else model.name
        self._load_timeout = min(model.settings.load_timeout or math.inf, MAX_WAIT)
        self._actions = collections.deque()  # what it is asked to do once it is ready
        self._wakeup = threading.Event()
        self._exited = threading.Event()
        self._ended = threading.Event()  # no request may be sent to it any more
        self._probe_sockets = set()  # which `stop` cuts
        self._own_inodes = set()  # of its listeners

    # -- called from any thread

    def start(self):
        """Begin to run on a thread of its own."""
        self._thread = start_thread(self._run, f"model {self.model.name}")

    def stop(self, at_once=False):
        """End it: within its stop timeout if it is loaded, else by a kill."""
        self._is_kill_asked |= at_once
        self._is_stop_asked = True
        self._interrupt()

    def sleep(self):
        """Put it to sleep; one that does not fall asleep is stopped."""
        self._ask_for(self._put_to_sleep)

    def wake(self):
        """Wake it up; one that does not wake is started anew."""
        self.started_at, self.progress = time.monotonic(), None
        self._ask_for(self._wake_up)

    def report_stall(self):
        """A request has been silent for long: check for a hang."""
        if self._silent_since is None and self.model.settings.hang_timeout:
            self._silent_since = time.monotonic()
            self._wakeup.set()

    def _ask_for(self, action):
        self._actions.append(action)
        self._wakeup.set()

    def is_reachable(self) -> Optional[bool]:
        """Return whether a request may be sent; None if it is not known yet."""
        return not self._ended.is_set()

    def record_answer(self, usage):
        """A request was answered: see LlamaServerBackend."""

    def died(self, timeout: float) -> bool:
        """Return whether it ended by itself, now or within the timeout."""
        return self._ended.wait(timeout) and not self._is_stop_asked

    def death(self, timeout: float) -> Optional[APIError]:
        """Return why it ended by itself, if that is known within the timeout."""
        self._thread.join(timeout)
        return self._problem

    # -- its thread, from the start to the end

    def _run(self):
        try:
            self._load_and_report()
            while self._is_ready and self._is_alive():
                if self._actions:
                    self._actions.popleft()()
                elif self._silent_since is not None:
                    self._check_hang()
                else:
                    self._wait(self._sleep_poll)
                    if self._sleep_poll:
                        self._look_asleep()
            if not self._is_stop_asked:
                if self._is_ready:
                    self._report_death()
                self._problem = self._failure()
        except APIError as error:
            error.__context__ = None
            self._problem = error.with_traceback(None)  # its frames would keep us alive
        except Exception as error:  # a bug, or no descriptors are left
            text = f"{self.model.name}: {type(error).__name__}: {error}"
            self._problem = LoadFailed(text)
        try:
            if self.upstream:
                self.upstream.close()
            self._terminate()
        except OSError as error:
            self._note(f"while it was stopped: {error}")
        self._listener.on_exited(self, self._problem)
        self._ended.set()

    def _load_and_report(self):
        self._is_ready = self._load()
        if self._is_ready:
            self._report_loaded()

    def _load(self):
        """Start it and wait until it is healthy; False: it ended, or is to end."""
        self._exited.clear()
        self._spawn()
        return self._await_healthy()

    def _is_alive(self):
        return not self._is_stop_asked and not self._exited.is_set()

    def _may_become_ready(self):
        return self._is_alive()

    def _report_death(self):
        """From now on no request is sent to it."""
        self._listener.on_dying(self)
        self._ended.set()

    def _end_error(self, why, exit_code=1):
        event = "ended by itself" if self._is_ready else "could not be started"
        text = f"{self._title} {event}: {why}{self._last_lines()}"
        is_out_of_memory = OUT_OF_MEMORY.search("\n".join([text, *self.lines]))
        return LoadFailed(text, exit_code, bool(is_out_of_memory))

    def _last_lines(self):
        return ""

    def _note(self, text):
        self._listener.on_line(self, f"llmswap: {text}")

    # -- waiting and asking

    def _wait(self, seconds):
        self._wakeup.wait(seconds)
        self._wakeup.clear()

    def _interrupt(self):
        """Wake its thread, also from a probe."""
        self._wakeup.set()
        cut(self._probe_sockets)

    def _probe(self, timeout, request=None):
        """Send a control request, a health check if none is given; return a Probe.

        `timeout` is for each part of the answer. `stop` and the end of the backend end
        it, too. A health check fails where another process listens.
        """
        settings, timeout = self.model.settings, max(0.001, timeout)
        method, path, body = request or ("GET", settings.check_endpoint, "")
        headers = {"Connection": "close", "Content-Type": "application/json"}
        if settings.proxy_key:
            headers["Authorization"] = f"Bearer {settings.proxy_key}".encode()
        sock = None
        try:
            sock = self.upstream.dial(min(timeout, CONNECT_TIMEOUT))
            if not request and not self._is_listener_ours():
                raise ConnectionRefusedError("another process answers there")
            if path is None:
                return Probe(200)
            self._probe_sockets.add(sock)
            if not (self._is_alive() or self._is_saving and not self._is_kill_asked):
                raise InterruptedError("it has ended, or is being stopped")
            sock.settimeout(timeout)
            connection = http.client.HTTPConnection(self.upstream.authority)
            connection.sock = sock
            target, sent = self.upstream.base_path + path, body.encode()
            connection.request(method, target, sent or None, headers)
            with connection.getresponse() as answer:
                probe = Probe(answer.status, answer.read(MAX_CONTROL_ANSWER))
        except (OSError, ValueError, http.client.HTTPException) as error:
            return Probe(error=error)
        finally:
            self._probe_sockets.discard(sock)
            if sock:
                sock.close()
        if probe.ok:
            self.upstream.mark_alive()
        return probe

    def _await_healthy(self):
        """Check its health until it is good; False: it ended, or is to end. Raise
        LoadTimeout when it showed no sign of progress for its load timeout."""
        limit = self._load_timeout
        self._began = self._looked_at = self._progress_at = time.monotonic()
        self.progress, self.refusal, self._seen_activity = None, None, set()
        while self._may_become_ready():
            left = self._progress_at + limit - time.monotonic()
            probe = self._probe(min(HEALTH_TIMEOUT, left))
            if probe.ok:  # but `stop` may have cut an answer so that it looks whole
                return self._is_alive()
            if type(probe.error).__name__ == "SSLCertVerificationError":
                raise LoadFailed(f"{self._title} has a bad certificate: {probe.reason}")
            if probe.status:
                self.refusal = f"its check-endpoint answers {probe.status}"
            self._look_at_load()
            now = time.monotonic()
            if now >= self._progress_at + limit:
                text = f"{self._title} showed no sign of progress for {limit:g} s"
                why = self.refusal or probe.reason
                raise LoadTimeout(f"{text} ({why}){self._last_lines()}")
            time.sleep(0.005)
            self._wait(min(0.1, (now - self._began) / 100))  # or until it writes a line
        return False

    def _look_at_load(self):
        """Count memory that its processes read or map as progress, like a line written.

        llama-server could report its progress, as to its router; but then it hangs
        after a SIGTERM, and a mapped file counts as read before it is.
        """
        if time.monotonic() < self._looked_at + LOOK_AT_LOADS:
            return
        self._looked_at, family = time.monotonic(), group_members(self.pid)
        memory = sum(memory_of(pid).get("VmRSS", 0) for pid in family)
        read = sum(_kernel_counts(f"/proc/{pid}/io", "read_bytes: ") for pid in family)
        activity = (memory + read) >> 20  # a few pages are no progress
        if activity not in self._seen_activity:
            self._seen_activity.add(activity)
            self._progress_at = self._looked_at
        before, size = self.progress, sum(map(model_file_size, family))
        if size:
            share = min(0.99, round(memory / size, 3))  # it is not ready
            self.progress = max(share, before or 0.0)
        self._listener.on_progress(self, self.progress != before)

    def _check_hang(self):
        """A request is silent: without an answer to health in time, too, it hangs."""
        limit = self.model.settings.hang_timeout
        until = self._silent_since + limit
        while self._is_alive() and (left := until - time.monotonic()) > 0:
            if self._probe(left).status is not None:
                break
            self._wait(min(1.0, until - time.monotonic()))
        else:
            if self._is_alive() and not self.upstream.seen_within(limit):
                self._give_up()
        self._silent_since = None

    def _give_up(self):
        self._is_ready = False  # it is killed, as it would not hear a SIGTERM
        self._report_death()
        limit = self.model.settings.hang_timeout
        raise LoadFailed(
            f"{self._title} hung: neither a request nor {limit:g} s of health "
            f"checks were answered; it is stopped{self._last_lines()}"
        )

    def _is_listener_ours(self):
        """Whether its port is served by its own processes; else set `_stranger`."""
        if self.pid is None or self.upstream.host not in LOOPBACK:
            return True
        may_hide = self.model.kind != "llama-server"
        for pause in (0.2, 0.0):  # the first may be the child's, which is ending
            new = listening_inodes(self.upstream.port) - self._own_inodes
            self._stranger = foreign_listener(new, self.pid, may_hide)
            if self._stranger is None:
                self._own_inodes |= new
                return True
            self._exited.wait(pause)
        return False

    def _report_loaded(self):
        """Report that it is ready, and what its own /v1/models says of it."""
        self._listener.on_loaded(self)
        entry = {}
        if self.model.kind == "llama-server":
            probe = self._probe(HEALTH_TIMEOUT, ("GET", "/v1/models", ""))
            with contextlib.suppress(*MALFORMED):
                row = json.loads(probe.body)["data"][0].items()
                row = {name: value for name, value in row if value is not None}
                parts = {**row.get("meta", {}), **row.get("architecture", {})}
                set(parts.get("input_modalities", ()))  # raises if it is no list
                entry = row
        self._listener.on_described(self, entry)

    # -- sleep

    def _probe_all(self, timeout, requests):
        """Send requests in order; return whether all were answered 200 in time."""
        end = time.monotonic() + timeout
        return all(self._probe(end - time.monotonic(), each).ok for each in requests)

    def _put_to_sleep(self):
        if self._probe_all(SLEEP_TIMEOUT, self.model.settings.sleep):
            self._listener.on_slept(self)
        elif self._is_alive():
            self._note("it did not fall asleep; it is stopped instead")
            self.stop()

    def _wake_up(self):
        is_awake, requests = False, self.model.settings.wake or (WAKE_REQUEST,)
        with contextlib.suppress(LoadTimeout):
            is_awake = self._probe_all(self._load_timeout, requests)
            is_awake = is_awake and self._await_healthy()
        self._is_asleep = False
        if is_awake:
            self._report_loaded()
        elif not self._is_stop_asked:
            self._note("it did not wake up")
            self._is_ready = False
            self._terminate()
            if self._probe(HEALTH_TIMEOUT).ok:  # it is remote, and its machine is awake
                raise LoadFailed(f"{self._title} did not wake up")
            self._load_and_report()

    def _look_asleep(self):
        """Find out whether a llama-server has put itself to sleep, or has woken."""
        probe = self._probe(HEALTH_TIMEOUT, ("GET", "/props", ""))
        is_asleep = b'"is_sleeping":true' in probe.body.replace(b" ", b"")
        if probe.ok and self._is_asleep != is_asleep:
            self._is_asleep = is_asleep
            if is_asleep:
                self._listener.on_slept(self)
            else:
                self._report_loaded()


# -- a child process -------------------------------------------------------------------


class ProcessBackend(Backend):
    """A model server that is a child process, in a session and group of its own."""

    _process = None  # the last that was started
    _reader = None  # the thread that reads its output

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.lines = collections.deque(maxlen=200)

    def died(self, timeout: float) -> bool:
        """See Backend. A process that is just ending, whose connections are closed
        before it is dead, has DEATH_TIMEOUT; one whose first thread has ended lives."""
        stat = process_stat(self.pid)
        if stat and stat.flags & PF_EXITING and stat.state != "Z":
            timeout = max(timeout, DEATH_TIMEOUT)
        return super().died(timeout)

    # -- load

    def _load(self):
        """Start it, again if it did not survive the restore of its context, and on
        another port if its port was taken meanwhile."""
        for _ in range(PORT_TRIES):
            is_healthy = super()._load()
            if is_healthy and self._restore_context():
                return self._is_alive()
            is_taken = self._stranger or not self._is_listener_ours()
            is_taken = is_taken and self.upstream.port == self.port
            if self._is_stop_asked or not (is_healthy or is_taken):
                return False
            self._terminate()
        return False

    def _spawn(self):
        model, self.port = self.model, free_port()
        environment = clean_environment(model.environment(str(self.port)))
        cwd, output = model.settings.cwd or None, subprocess.STDOUT
        self._surroundings = {"env": environment, "cwd": cwd, "stderr": output}
        argv = self._command()
        find_program(argv[0], environment, cwd)
        self.upstream = Upstream(model.url(str(self.port)))
        if model.kind == "llama-server" and "--sleep-idle-seconds" in argv:
            self._sleep_poll = SLEEP_POLL
        self._stranger, self._own_inodes = None, set()
        self._oom_kills = oom_kills()
        score = str(model.settings.oom_score_adj)
        argv = ["/bin/sh", "-c", SPAWN_SCRIPT, "sh", score, DESCRIPTORS, *argv]
        files = {"stdin": GUARD.fd, "stdout": subprocess.PIPE, "bufsize": 0}
        self._process = GUARD.spawn(argv, **files, **self._surroundings)
        self.pid = self._process.pid
        self.location = f"pid {self.pid}, port {self.port}"
        try:
            self._reader = start_thread(self._read_output, "output", self._process)
            start_thread(self._await_exit, "exit")
        except RuntimeError:  # no more threads can be started: `_terminate` ends it
            self._exited.set()
            raise

    def _command(self):
        return self.model.command(table_of(self.model), str(self.port))

    def _restore_context(self):
        """Do what comes between a good health and the first request; False: again."""
        return True

    def _read_output(self, process):
        """Pass its output on line by line to its end, on a thread of its own. A process
        that left the group may hold it open: when the leader has ended, no more is read
        than the pipe can hold."""
        data, partial_line, exit_fd = b"\n", b"", open_pidfd(process.pid)
        left = math.inf
        waiter = select.poll()
        for each in filter(None, (process.stdout, exit_fd)):
            waiter.register(each, select.POLLIN)
        with process.stdout as output:
            while data and left > 0 and process.returncode is None:
                ready = dict(waiter.poll())
                left = min(left, 2 * PIPE_SIZE) if exit_fd in ready else left
                is_readable = output.fileno() in ready
                data = output.read(MAX_LINE // 2) if is_readable else b""
                left -= len(data)
                *lines, partial_line = (partial_line + data).split(b"\n")
                if len(partial_line) > (MAX_LINE // 2 if data else 0):
                    lines, partial_line = [*lines, partial_line], b""
                for line in lines:
                    self.lines.append(line.decode("utf-8", "replace").rstrip("\r"))
                    self._listener.on_line(self, self.lines[-1])
                self._progress_at = time.monotonic()
                if not self._is_ready:
                    self._wakeup.set()
        if exit_fd is not None:
            os.close(exit_fd)

    def _await_exit(self):
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)  # it is not reaped yet
        self._exited.set()
        self._interrupt()  # its workers may hold the socket of a probe open

    def _may_become_ready(self):
        """A stranger on a fixed port may leave it; from a port of ours it does not."""
        patience = 0.0 if self.upstream.port == self.port else HEALTH_TIMEOUT
        if time.monotonic() < self._began + patience:
            self._stranger = None
        return self._is_alive() and not self._stranger

    # -- stop

    def _terminate(self):
        """Run the stop command or send SIGTERM, wait for the stop timeout, and kill."""
        if self._process is None or self._process.returncode is not None:
            return
        self.upstream.close()
        status, timeout = None, self.model.settings.stop_timeout
        try:
            command = self.model.stop_command(str(self.port), str(self.pid))
            if self._exited.is_set() or not (self._is_ready or command):
                return
            if self._is_ready:
                self._save_context()
            deadline = time.monotonic() + timeout
            if command:  # it may have more to do, such as to remove a container
                until, more = lambda: self._is_kill_asked, self._surroundings
                status, text = run_command(command, timeout, until, **more)
                if status != 0:
                    self._note(f"cmd-stop: {text or 'it failed'}")
            if status is None:
                self._signal_group(signal.SIGTERM)
            while (left := deadline - time.monotonic()) > 0:
                if self._exited.is_set() or self._is_kill_asked:
                    break
                self._wait(left)
        finally:
            self._reap()

    def _save_context(self):
        """Do what comes between the last request and the stop."""

    def _reap(self):
        """Kill the whole group, then reap its leader."""
        gpu_users = group_members(self.pid)
        self._signal_group(signal.SIGKILL)  # its workers may outlive the leader
        if not self._exited.wait(10.0):
            self._note(f"process {self.pid} was killed, but hangs in the kernel")
            self._exited.wait()
        self._signal_group(signal.SIGKILL)  # what was forked at that moment
        GUARD.forget(self.pid)
        if self._reader:
            self._reader.join(2.0)
        self._process.wait()
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and _is_group_alive(self.pid):
            time.sleep(0.002)
        if not self._is_kill_asked:
            settle(gpu_users, self._settle_timeout)

    def _signal_group(self, number):
        with contextlib.suppress(OSError):
            os.killpg(self.pid, number)

    def _failure(self):
        self._terminate()
        status = self._process.returncode
        why = f"exited with status {status}"
        if self._stranger and not self._is_ready:
            why = f"its port {self.upstream.port} is held by {self._stranger}"
        elif status in (-9, 128 + 9) and oom_kills() > self._oom_kills:
            why = "killed by the kernel: out of memory"
        elif status < 0:
            known = {number.value: number.name for number in signal.Signals}
            why = f"killed by signal {-status} ({known.get(-status, 'unknown')})"
        return self._end_error(why, status if status >= 0 else 1)

    def _last_lines(self):
        """End it; return the last lines that it wrote."""
        self._terminate()
        text = "\n".join([line for line in self.lines if line.strip()][-10:])
        return f"\n{text[-3000:]}" if text else ""


def open_pidfd(pid: int) -> Optional[int]:
    """Return a descriptor that is readable once the process has ended, or None."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _is_group_alive(group):
    """Whether any of it still runs: the dead count no more, reaped or not."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass  # its orphans are our children where we are process 1
    with contextlib.suppress(OSError):
        os.killpg(group, 0)
        stats = filter(None, map(process_stat, group_members(group)))
        return any(stat.state not in "ZX" for stat in stats)
    return False


def memory_of(pid: int) -> Dict[str, int]:
    """Return bytes of resident memory: `VmRSS` and its parts, such as `RssAnon`."""
    status = read_text_or_empty(f"/proc/{pid}/status")
    rows = re.findall(r"^(Rss\w+|VmRSS):\s+(\d+)", status, re.MULTILINE)
    return {name: int(size) * 1024 for name, size in rows}


def oom_kills() -> int:
    """Return how many processes the kernel has killed for memory since boot."""
    return _kernel_counts("/proc/vmstat", "oom_kill ")


def _kernel_counts(path, name):
    match = re.search(rf"^{name}(\d+)$", read_text_or_empty(path), re.MULTILINE)
    return int(match[1]) if match else 0


# What servers write when memory is short: llama.cpp with CUDA, ROCm, Vulkan, Metal and
# without a GPU; PyTorch; vLLM; and our own words for the kernel's killer.
OUT_OF_MEMORY = re.compile(
    r"out ?of ?(device|host)? ?memory|insufficient memory|cannot allocate memory"
    r"|unable to allocate \S+ buffer|failed to allocate (?!context\b|.*pinned)"
    r"|memory allocation of size \d+ failed|STATUS_ALLOC_FAILED|bad_alloc|^MemoryError"
    r"|Free memory on device .* is less than|No available memory for the cache blocks"
    r"|larger than the (available KV cache memory|maximum number of tokens that can)",
    re.IGNORECASE | re.MULTILINE,
)


# -- contexts that outlive their backend -----------------------------------------------
#
#    A stop of llama-server loses the prompts that it has processed. It can write the
#    state of each slot to a file, and read it again after its next start:
#
#        STATE-DIR/context/manifest.json     which files count, and of which command
#        STATE-DIR/context/MODEL/MODEL.SLOT.ID       one slot, written by llama-server
#
#    The manifest names a file from when it is complete until before it is read. So,
#    killed at any moment, it restores nothing half, or that a server may have died of.

MIN_CONTEXT = 256  # tokens; fewer are soon processed again
SLOT_LIST_TIMEOUT = 1.0  # s
UNKNOWN_PROMPT_SPEED = 500.0  # tokens/s, until an answer tells it
SAVE_SHARE = 0.1  # of the time to process a context again; a save may take as long
MIN_SAVE_TIMEOUT = 0.25  # s
MAX_FAILURES = 2  # in a row, then no more contexts of a command are kept
EMBEDDING_OPTIONS = {"--embedding", "--embeddings", "--rerank", "--reranking"}


class SavedContext(NamedTuple):
    """A saved context: the digest of its model's command, the speed of its prompts in
    tokens/s, its bytes, and (number, path, tokens) of slots."""

    command: str = ""
    speed: float = UNKNOWN_PROMPT_SPEED
    size: int = 0
    slots: Sequence[Tuple[int, str, int]] = ()


class ContextStore:
    """The saved contexts of the models. Any thread may call. Two llmswaps with one
    folder can only delete each other's."""

    def __init__(self):
        self.failures = collections.Counter()  # in a row, by command
        self.useful = set()  # the commands of which a restored context was of use
        self._lock = threading.Lock()  # of what follows
        self._root = ""
        self._limit = math.inf
        self._folders = set()  # of the models that have contexts
        self._saved = {}  # SavedContext by folder, the oldest first

    def configure(self, config: Config):
        """Use this configuration from now on, and delete what has no model there."""
        with self._lock:
            self._folders = {each.context_dir for each in config.models.values()} - {""}
            self._limit = config.settings.context_max
            self._root = os.path.join(config.settings.state_dir, "context")
            with contextlib.suppress(OSError, *MALFORMED):
                if not self._saved:
                    with open(f"{self._root}/manifest.json", "rb") as file:
                        rows = json.load(file).items()
                    self._saved = {path: _saved_context(*row) for path, row in rows}
            with contextlib.suppress(OSError):
                self._update()
                folders = {f"{e.path}/" for e in os.scandir(self._root) if e.is_dir()}
                discard(folders - self._folders)

    def size_of(self, folder: str) -> Optional[int]:
        """Return how many bytes are saved there; None: no model has that folder."""
        saved = self._saved.get(folder, SavedContext())
        return saved.size if folder in self._folders else None

    def exchange(self, folder: str, context=SavedContext()) -> SavedContext:
        """Return what was saved there, and forget it for another context, if any; the
        oldest contexts beyond the limit go. Raise OSError."""
        with self._lock:
            before = self._saved.pop(folder, SavedContext())
            if context.slots:
                self._saved[folder] = context
            if context.slots or before.slots:
                self._update()
            return before

    def _update(self):
        for folder, context in [*self._saved.items()]:
            size = sum(each.size for each in self._saved.values())
            if folder not in self._folders or size > self._limit:
                del self._saved[folder]
                discard(path for _, path, _ in context.slots)
        write_json(f"{self._root}/manifest.json", self._saved)


def _saved_context(command, speed, size, slots):
    """Return a row of the manifest; MALFORMED if it is none."""
    slots = [(int(number), str(path), int(tokens)) for number, path, tokens in slots]
    return SavedContext(str(command), max(1.0, float(speed)), int(size), slots)


open_private = functools.partial(os.open, mode=0o600)  # a new file is this user's only


def write_json(path: str, value):
    """Replace a file at once by one that only this user may read. Raise OSError."""
    with open(f"{path}.{os.getpid()}", "w", opener=open_private) as file:
        json.dump(value, file, indent=1)
    os.replace(file.name, path)


def discard(paths: Iterable[str]):
    """Delete files, and folders with all that is in them, in the background."""

    def delete():
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)  # if it is a folder
            with contextlib.suppress(OSError):
                os.unlink(path)

    with contextlib.suppress(RuntimeError):  # no more threads can be started
        start_thread(delete, "discard")


class LlamaServerBackend(ProcessBackend):
    """A llama-server whose context is saved before a stop, and restored after a start.

    What fails costs a line of the log and a bounded time, and deletes what was saved.
    Its listener's `on_context(kind, tokens, bytes, seconds)` reports tokens "saved" or
    "restored" and how long that took, and those "used" by an answer: then the seconds
    are those that it would have taken to process the tokens again.
    """

    def __init__(self, *arguments, contexts: ContextStore):
        super().__init__(*arguments)
        self._contexts = contexts
        self._digest = self._files = ""  # of its command; the folder of slots
        self._speed = UNKNOWN_PROMPT_SPEED

    def record_answer(self, usage):
        """Learn how fast prompts are processed, and whether the restore was of use:
        then more of a prompt was in the cache than answers of this run left there. It
        was of none if a prompt as long as the largest slot had nothing in the cache."""
        tokens, cached = usage.tokens_in, usage.tokens_cached
        if tokens is None or cached is None:
            return
        if usage.prompt_speed and tokens - cached >= MIN_CONTEXT:
            self._speed = usage.prompt_speed
        if self._unused and cached >= MIN_CONTEXT and cached > self._longest:
            self._unused = self._contexts.failures[self._digest] = 0
            self._contexts.useful.add(self._digest)
            self._listener.on_context(self, "used", cached, 0, cached / self._speed)
        elif cached < MIN_CONTEXT and tokens >= self._unused:
            self._is_useless = self._digest not in self._contexts.useful
        self._longest = max(self._longest, tokens + (usage.tokens_out or 0))

    def _command(self):
        """Return its command, with a folder for its contexts if there can be one."""
        self._digest, self._files = "", self.model.context_dir
        root = os.path.dirname(self._files.rstrip("/"))
        try:
            for folder in (os.path.dirname(root), root, self._files):
                os.makedirs(folder, 0o700, exist_ok=True)
        except OSError as error:
            self._note(f"contexts cannot be kept: {error}")
            self.model = self.model._replace(context_dir="")
        argv = super()._command()
        paths = [path for word, path in zip(argv, argv[1:]) if word == f"--{SAVE_PATH}"]
        if paths and EMBEDDING_OPTIONS.isdisjoint(argv):
            folder = os.path.join(self.model.settings.cwd, paths[-1])
            self._files = os.path.join(os.path.abspath(folder), "")
            self._digest = self._digest_of(argv)
        elif self.model.context_dir and not paths:
            self._note("this llama-server cannot save contexts")
        return argv

    def _digest_of(self, argv):
        """Return what changes with the command, its environment, binary or models."""
        cwd = self.model.settings.cwd
        paths = [find_program(argv[0], self._surroundings["env"], cwd)]
        paths += [os.path.join(cwd, path) for option, path in zip(argv, argv[1:])
                  if option == "--model" or path.endswith(".gguf")]
        stats = [os.stat(path) for path in paths if os.path.isfile(path)]
        files = [(each.st_size, each.st_mtime_ns) for each in stats]
        words = [word for word in argv if word != str(self.port)]
        identity = repr([words, sorted(self.model.settings.env.items()), files])
        return hashlib.sha256(identity.encode()).hexdigest()

    def _restore_context(self):
        """Give the server, which is not in use yet, what was saved of its command, in
        `stop-timeout` and no longer than it takes to process the prompts again. Return
        False if it is to be started anew, without that: it died or refused some, after
        which some builds answer nonsense."""
        began = time.monotonic()
        self._restored = {}  # tokens by slot
        self._unused = 0  # the most of them, until an answer used some
        self._longest = 0  # tokens that an answer of this run left in a slot
        self._is_useless = False
        try:
            saved = self._contexts.exchange(self.model.context_dir)
            paths = [path for _, path, _ in saved.slots if os.path.isfile(path)]
            is_whole = sum(map(os.path.getsize, paths)) == saved.size
            if saved.slots and saved.command != self._digest:
                text = "the command or a file has changed"
                self._note(f"context was not restored: {text}")
            elif saved.slots and is_whole:
                self._speed = saved.speed
                tokens = sum(tokens for _, _, tokens in saved.slots)
                limit = min(self.model.settings.stop_timeout, tokens / saved.speed)
                for number, path, tokens in saved.slots:
                    self._ask(began + limit, f"/slots/{number}?action=restore", path)
                    self._restored[number] = tokens
                self._unused = max(self._restored.values())
                self._tell("restored", saved, began)
            return True
        except (OSError, *MALFORMED) as error:
            self._restored = {}
            self._count_failure(f"context was not restored: {error}")
            return isinstance(error, TimeoutError)
        finally:
            self._discard_all_but(())

    def _save_context(self):
        """Save what the slots hold, now that no request is left: in `stop-timeout` and
        a tenth of the time to process the prompts again; what takes longer fails."""
        if self._is_asleep:
            return  # it holds nothing, and a question would wake it
        if self._unused and self._is_useless:
            self._count_failure("the restored context was of no use")
        digest, slots, self._is_saving = self._digest, [], True
        is_wanted = self._contexts.size_of(self.model.context_dir) is not None
        try:
            if digest and is_wanted and self._contexts.failures[digest] < MAX_FAILURES:
                slots = self._save_slots(time.monotonic())
        except (OSError, *MALFORMED) as error:
            self._count_failure(f"context was not saved: {error}")
        self._is_saving = False
        self._discard_all_but(slots)

    def _save_slots(self, began):
        limit = self.model.settings.stop_timeout
        tokens = dict(self._restored)  # not in /slots until they are used
        for slot in self._ask(began + min(limit, SLOT_LIST_TIMEOUT), "/slots"):
            if slot.get("n_prompt_tokens"):
                tokens[int(slot["id"])] = slot["n_prompt_tokens"]
        tokens = {number: n for number, n in tokens.items() if n >= MIN_CONTEXT}
        share = SAVE_SHARE * sum(tokens.values()) / self._speed
        deadline = time.monotonic() + min(limit, max(MIN_SAVE_TIMEOUT, share))
        size, slots = 0, []
        for number in tokens:
            name = f"{folder_name(self.model.name)}.{number}.{os.urandom(4).hex()}"
            path = self._files + name
            open(path, "x", opener=open_private).close()
            answer = self._ask(deadline, f"/slots/{number}?action=save", path)
            if os.path.getsize(path) != answer["n_written"]:
                raise OSError("the file is not whole; is the disk full?")
            if answer["n_saved"] >= MIN_CONTEXT:
                size += answer["n_written"]
                slots.append((number, path, answer["n_saved"]))
        if slots:
            saved = SavedContext(self._digest, self._speed, size, slots)
            self._contexts.exchange(self.model.context_dir, saved)
            self._tell("saved", saved, began)
        return slots

    def _count_failure(self, text):
        if self._is_kill_asked or (self._is_stop_asked and not self._is_ready):
            return  # that is why
        self._contexts.failures[self._digest] += 1
        if self._contexts.failures[self._digest] >= MAX_FAILURES:
            text += "; no more contexts are kept"
        self._note(text)

    def _discard_all_but(self, slots):
        """Delete its other files of slots, also those that a kill left behind."""
        name = re.escape(self._files + folder_name(self.model.name))
        is_ours = re.compile(rf"{name}\.\d+\.[0-9a-f]{{8}}").fullmatch
        with contextlib.suppress(OSError):
            paths = {each.path for each in os.scandir(self._files)}
            discard(set(filter(is_ours, paths)) - {path for _, path, _ in slots})

    def _tell(self, kind, saved, began):
        tokens = sum(tokens for _, _, tokens in saved.slots)
        seconds = time.monotonic() - began
        self._listener.on_context(self, kind, tokens, saved.size, seconds)

    def _ask(self, deadline, target, path=None):
        """Return what the answer's JSON means; `path` is the file that is to be read or
        written. Raise OSError; TimeoutError if it is late."""
        request = "GET", target, ""
        if path:
            request = "POST", target, json.dumps({"filename": os.path.basename(path)})
        probe = self._probe(deadline - time.monotonic(), request)
        if probe.ok:
            return json.loads(probe.body)
        text = f"{target}: {probe.reason} {probe.body[:200].decode(errors='replace')}"
        raise TimeoutError(text) if probe.timed_out else OSError(text)


# -- memory of what runs ---------------------------------------------------------------

BUSY_GPU = 10  # per cent of use
_CSV = "--format=csv,noheader,nounits"
_GPU_QUERIES = (  # question; command; the numbers in a row of its answer; their units
    ("processes", f"nvidia-smi --query-compute-apps=pid,used_gpu_memory {_CSV}",
     r"^\s*(\d+)\b(?:,\s*(\d+))?", (1, 1 << 20)),
    ("processes", "rocm-smi --showpids",
     r"^\s*(\d+)\b(?:\s+\S+\s+\S+\s+(\d+)\b)?", (1, 1)),
    ("sizes", f"nvidia-smi --query-gpu=memory.total,memory.used {_CSV}",
     r"^ *(\d+), *(\d+) *$", (1 << 20, 1 << 20)),
    ("sizes", "rocm-smi --showmeminfo vram --csv", r"^card\d+,(\d+),(\d+)", (1, 1)),
    ("use", f"nvidia-smi --query-gpu=utilization.gpu {_CSV}", r"^\s*(\d+)\s*$", (1,)),
    ("use", "rocm-smi --showuse --csv", r"^card\d+,\s*(\d+)", (1,)),
)


def ask_gpus(question: str, timeout: float = 2.0) -> List[Tuple[int, ...]]:
    """Return what the vendor's tool answers: of `processes` that use a GPU the pid and
    bytes (0: not told), of `sizes` each GPU's total and used bytes, of `use` per cent.
    """
    rows = []
    for about, command, row, units in _GPU_QUERIES:
        argv = command.split()
        if about == question and shutil.which(argv[0]):
            _, text = run_command(argv, timeout)
            for match in re.finditer(row, text, re.MULTILINE):
                cells = zip(match.groups("0"), units)
                rows.append(tuple(int(cell) * unit for cell, unit in cells))
    return rows


def gpu_occupant() -> Optional[str]:
    """Return which process holds GPU memory, or that a GPU is busy. Takes seconds."""
    for pid, _ in ask_gpus("processes", TOOL_TIMEOUT):
        return f"{process_name(pid)} holds GPU memory"
    [use] = max(ask_gpus("use", TOOL_TIMEOUT), default=[0])
    return f"a GPU is in use, {use} %" if use > BUSY_GPU else None


def settle(pids: Set[int], timeout: float):
    """Wait until none of these processes holds GPU memory, `timeout` at most."""
    deadline = time.monotonic() + timeout
    while pids and (left := deadline - time.monotonic()) > 0:
        if pids.isdisjoint(pid for pid, _ in ask_gpus("processes", min(2.0, left))):
            break
        time.sleep(0.05)


def resident_by_group() -> Dict[int, int]:
    """Return bytes of resident memory by process group; empty without /proc."""
    sizes = collections.Counter()
    for stat in filter(None, map(process_stat, processes())):
        sizes[stat.group] += stat.resident * os.sysconf("SC_PAGE_SIZE")
    return sizes


def gpu_memory_by_group() -> Dict[int, int]:
    """Return bytes of GPU memory by process group, as the vendor's tool shows it."""
    sizes = collections.Counter()
    for pid, amount in ask_gpus("processes"):
        stat = process_stat(pid)
        if stat and amount:
            sizes[stat.group] += amount
    return sizes


# -- systemd units ---------------------------------------------------------------------

COMMAND_TIMEOUT = 5.0  # s; for a quick question to systemd
JOURNAL_DELAY = 0.4  # s; by then it has what a process wrote at its end
UNIT_POLL = 5.0  # s between looks at a unit whose main process is not known
RUNNING = ("active", "activating", "reloading")


def systemctl(unit: str, verb: str, *options: str, **more):
    """Do this to a unit, named as `unit =` names it; see run_command."""
    scope = "--system" if unit.startswith("system:") else "--user"
    words = ["systemctl", scope, "--no-ask-password", verb, *options]
    argv = [*words, "--", unit.removeprefix("system:")]
    more = {"timeout": COMMAND_TIMEOUT, "stderr": subprocess.STDOUT, **more}
    return run_command(argv, **more)


def unit_properties(unit: str, *names: str, **more) -> List[str]:
    """Return the values of these properties, "unknown" where systemd is silent."""
    _, text = systemctl(unit, "show", "-p", ",".join(names), **more)
    values = dict(row.partition("=")[::2] for row in text.split("\n"))
    return [values.get(name, "unknown") for name in names]


def running_units(units: Iterable[str], gives_up: Callable) -> Set[str]:
    """Return those of the units that run. It takes seconds for each if systemd hangs,
    but ends soon once gives_up() is true."""
    more = {"until": gives_up}
    states = {unit: unit_properties(unit, "ActiveState", **more) for unit in units}
    return {unit for unit, [state] in states.items() if state in RUNNING}


class UnitBackend(Backend):
    """A model server that is a systemd service, run by systemctl (which may hang)."""

    _is_started = False

    def adopt(self):
        """Begin with a unit that runs already, ready or not."""
        self._is_started = True
        self.start()

    def _spawn(self):
        if not self._is_started:
            self._is_started = True
            systemctl(self.location, "reset-failed")
            began, limit = time.monotonic(), self._load_timeout
            limits = {"timeout": limit, "until": lambda: self._is_stop_asked}
            status, text = systemctl(self.location, "start", **limits)
            if status is None and time.monotonic() >= began + limit:
                raise LoadTimeout(f"{self._title}: systemctl start took {limit:g} s")
            if status != 0 and not self._is_stop_asked:
                raise self._end_error(text)
        self._exited = exited = threading.Event()  # not that of the last start's watch
        if not self._is_active():
            exited.set()
        start_thread(self._watch_unit, "unit", exited)

    def _is_active(self):
        """Look for its main process; return whether it runs, as far as systemd says."""
        main, state = unit_properties(self.location, "MainPID", "ActiveState")
        if state == "unknown":
            return True
        self.pid = main.isdigit() and int(main) or None  # a target has none
        return state in RUNNING

    def _watch_unit(self, exited):
        """Wait until its main process ends or, without one, systemd says so."""
        while (fd := open_pidfd(self.pid or 0)) is None:
            interval = UNIT_POLL if self._is_ready else 1.0
            if exited.wait(interval) or not self._is_active():
                break
        if fd is not None:
            await_event(fd, select.POLLIN, -1)  # for as long as it takes
            os.close(fd)
        exited.set()
        self._interrupt()

    def _terminate(self):
        """Stop the unit, and wait until nothing of it is left."""
        if not self._is_started:
            return
        gpu_users = group_members(self.pid)
        if not self._is_ready:
            systemctl(self.location, "kill", "--signal=KILL")
        timeout = self.model.settings.stop_timeout
        limits = {"timeout": timeout, "until": lambda: self._is_kill_asked}
        status, text = systemctl(self.location, "stop", **limits)
        if status != 0:
            self._note(f"systemctl stop: {text or 'no answer'}; it is killed")
            systemctl(self.location, "kill", "--signal=KILL")
            systemctl(self.location, "stop")
        self._exited.set()
        self._is_started = False
        settle(gpu_users, self._settle_timeout)

    def _failure(self):
        """Why it ended; None: somebody else stopped it, which is no failure, or has
        restarted it: then it is left alone."""
        names = "MainPID", "ActiveState", "Result", "ExecMainStatus"
        for _ in range(100):  # systemd may notice the end after us
            main, state, result, status = unit_properties(self.location, *names)
            is_changing = state.endswith("activating") and result == "success"
            if main != str(self.pid) and not (is_changing and main == "0"):
                break
            time.sleep(0.05)
        if self._is_ready and result == "success":
            runs_again = state in RUNNING and main not in ("0", str(self.pid))
            self._is_started = not runs_again
            event = "restarted" if runs_again else "stopped"
            self._note(f"{self.location} was {event} by somebody else")
            return None
        killed = "killed by the kernel: out of memory"
        reason = {"success": "it ended", "oom-kill": killed}.get(result, result)
        code = int(status) if result == "exit-code" else 1
        return self._end_error(f"{reason}, status {status}", code)

    def _last_lines(self):
        """Return the journal's last lines, which it has a moment after the end."""
        time.sleep(JOURNAL_DELAY)
        name = self.location.removeprefix("system:")
        which = "--user-unit" if name == self.location else "--unit"
        argv = ["journalctl", which, name, "-n", "20", "-o", "cat", "-q"]
        _, text = run_command(argv, COMMAND_TIMEOUT)
        return f"\n{text[-3000:] or '(the journal shows us nothing of it)'}"


# -- remote models ---------------------------------------------------------------------

FRESH = 15.0  # s; a remote backend with a sign of life since then is not probed
WAKE_INTERVAL = 2.0  # s, from one magic packet to the next


class RemoteBackend(Backend):
    """A server elsewhere. To stop it is to forget it. If it vanishes, it has no
    problem: it is asleep, not broken."""

    _next_packet = 0.0

    def is_reachable(self) -> Optional[bool]:
        """See Backend. It is asked unless it gave a sign of life lately."""
        if self._ended.is_set():
            return False
        trusted = math.inf if self.upstream.is_busy else FRESH
        if self.upstream.seen_within(trusted) or self._probe(HEALTH_TIMEOUT).ok:
            return True
        self._give_up()
        return False if self._ended.wait(POLL_INTERVAL) else None

    def died(self, timeout: float) -> bool:
        """Return whether it vanished, as far as it can be found out so soon."""
        probe = self._probe(timeout)
        is_refused = probe.error is not None and not probe.timed_out
        is_silent = probe.timed_out and timeout >= CONNECT_TIMEOUT
        if is_refused or (is_silent and not self.upstream.is_busy):
            self._give_up()
        return self._exited.is_set() and self._ended.wait(DEATH_TIMEOUT)

    def _give_up(self):
        self._exited.set()
        self._wakeup.set()

    def _spawn(self):
        """It runs already, and to stop it is to forget it."""

    _terminate = _spawn

    def _may_become_ready(self):
        mac, now = self.model.settings.wake_mac, time.monotonic()
        if mac and now >= self._next_packet:
            self._next_packet = now + WAKE_INTERVAL
            address = self.model.settings.wake_broadcast
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            try:
                with socket.socket(family, socket.SOCK_DGRAM) as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                    sock.sendto(b"\xff" * 6 + mac * 16, address)
            except OSError as error:
                self._note(f"Wake-on-LAN: {error}")
        return self._is_alive()

    def _failure(self):
        """It vanished, which is no failure."""
        self._note("it does not answer any more: asleep or gone")
        while self.upstream.is_busy and self.upstream.seen_within(FRESH):
            if self._is_stop_asked:
                break
            self._wait(POLL_INTERVAL)  # it may be a server that drains


# -- files of models -------------------------------------------------------------------

COMPANION_OPTIONS = ("-mm", "--mmproj", "-md", "--model-draft")
MODEL_OPTIONS = ("-m", "--model", *COMPANION_OPTIONS)


def model_file_size(pid: int) -> int:
    """Return the bytes of the model files named in the process's command line."""
    words = read_text_or_empty(f"/proc/{pid}/cmdline").split("\0")
    return size_of_files(words, f"/proc/{pid}/cwd")


def size_of_files(words: List[str], folder: str, options=MODEL_OPTIONS) -> int:
    """Return the bytes of the model files that these options name in a command, with
    all shards of those of which they name the first."""
    named = {after for word, after in zip(words, words[1:]) if word in options}
    paths = [glob.escape(os.path.join(folder, path)) for path in named]
    patterns = [re.sub(r"-00001(-of-\d{5}\.gguf)$", r"-?????\1", p) for p in paths]
    files = itertools.chain.from_iterable(map(glob.iglob, patterns))
    return sum(map(os.path.getsize, filter(os.path.isfile, files)))


# -- what models need, and what there is -----------------------------------------------

GPU_RESERVE = 512 << 20  # bytes of each GPU that no model gets: for driver and desktop
RAM_SHARE = 0.9  # of the machine's memory is for models
PEAK_MARGIN = 1.05  # a model counts for so much more than the peak it was measured at
FILES_MARGIN = 1.2  # likewise where only its files are known
SQUEEZED = 0.9  # a peak beside others below that share of the known need is not learned
MEASURE_INTERVAL = 60.0  # s, between two measurements of a model that serves
TOOL_TIMEOUT = 10.0  # s; for the vendor's tool at the start, and llama-fit-params


def machine_budget(is_own: Callable[[int], bool] = lambda pid: False) -> Dict[str, int]:
    """Return the bytes of `vram` (if there is a GPU) and `ram` that models can have on
    this machine: GPU memory that others hold is not theirs. Asks the vendor's tool."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    budget = {"ram": int(memory * RAM_SHARE)}
    sizes = ask_gpus("sizes", TOOL_TIMEOUT)
    if sizes:
        own = sum(amount for pid, amount in ask_gpus("processes") if is_own(pid))
        free = sum(total - used - GPU_RESERVE for total, used in sizes)
        budget["vram"] = max(1, free + own)
    return budget


def belongs_to(pid: int, groups: Set[int], units: Set[str]) -> bool:
    """Return whether a process belongs to one of these process groups or units."""
    stat, cgroup = process_stat(pid), read_text_or_empty(f"/proc/{pid}/cgroup")
    names = {unit.removeprefix("system:").removesuffix(".service") for unit in units}
    folders = {f"{name}.service" for name in names}
    is_in_unit = not folders.isdisjoint(re.split("[/\n]", cgroup))
    return is_in_unit or (stat is not None and stat.group in groups)


def with_machine_budget(written: Mapping, machine: Mapping) -> Dict[str, int]:
    """Return a budget as written, with what the machine has where `auto` is written."""
    sizes = {**machine, **{n: size for n, size in written.items() if size is not None}}
    return {name: sizes[name] for name in written if name in sizes}


def memory_taken(group: int, on_gpu: Optional[int]) -> Dict[str, int]:
    """Return the bytes of `ram`, and of `vram` unless it is not known, that a process
    group takes; {} if it is gone. Of mapped files only as much counts as the model
    files are larger than what is on a GPU."""
    pids, sizes = group_members(group), collections.Counter()
    for pid in pids:
        sizes.update(memory_of(pid))
    if not sizes:
        return {}
    mapped = sizes["RssFile"]
    if on_gpu:
        mapped = min(mapped, max(0, sum(map(model_file_size, pids)) - on_gpu))
    taken = {"ram": sizes["RssAnon"] + sizes["RssShmem"] + mapped}
    return taken if on_gpu is None else {**taken, "vram": on_gpu}


def fit_params_estimate(model: Model) -> Dict[str, int]:
    """Return the bytes of `vram` and `ram` that the llama-fit-params beside the model's
    llama-server prints for those options that it has, projector and draft model added;
    {} if it prints none. Takes 20 s at most."""
    cwd = model.settings.cwd
    try:
        argv = model.command(table_of(model), "0")
        server = os.path.realpath(find_program(argv[0], os.environ, cwd))
    except (ConfigError, LoadFailed):
        return {}
    tool = os.path.join(os.path.dirname(server), "llama-fit-params")
    _, text = run_command([tool, "--help"], TOOL_TIMEOUT)
    counts = {  # of values that follow, by option
        option: len(values.split())
        for options, values, _ in OPTION_HELP.findall(text)
        for option in re.split(", +", options)
    }
    if "-fitp" not in counts:
        return {}
    command, words = [tool], iter([*argv[1:], "--offline", "-fitp", "on"])
    for word in words:
        if word in counts:
            command += [word, *itertools.islice(words, counts[word])]
    more = {"env": clean_environment(model.environment("0")), "cwd": cwd or None}
    _, text = run_command(command, TOOL_TIMEOUT, **more)
    amounts = {"vram": 0, "ram": 0}
    rows = re.findall(r"^(\S+) (\d+) (\d+) (\d+) *$", text, re.MULTILINE)
    for name, *megabytes in rows:
        is_host = name.lower() == "host"
        amounts["ram" if is_host else "vram"] += sum(map(int, megabytes)) << 20
    companions = size_of_files(argv, cwd, COMPANION_OPTIONS)
    amounts["vram" if amounts["vram"] else "ram"] += companions
    return amounts if rows else {}


class Known(NamedTuple):
    """The known needs of one command: bytes by resource, and their source."""

    model: str = ""
    source: str = "not known yet"
    amounts: Mapping[str, int] = {}


class Needs:
    """What models need where that is not written. Any thread may call.

    They are kept by command in `needs.json`, except for those that were raised because
    memory ran out: a restart forgets them. `log(level, text)` must not block; only
    `estimate` and `save` do.
    """

    def __init__(self, directory: str, log):
        self._path = os.path.join(directory, "needs.json")
        self._log = log
        self._known, self._saving = {}, threading.Lock()
        try:
            self._known = self._read()
        except OSError as error:
            log("warning", f"{self._path} cannot be read: {error}")
        self._saved = dict(self._known)

    def of(self, model: Model, budget: Mapping[str, int]) -> Tuple[Dict[str, int], str]:
        """Return the model's needs, all of the budget if unknown, and their source."""
        if not model.has_auto_needs:
            return model.settings.needs or {}, "written"
        known = self._known.get(_command_key(model), Known())
        amounts = {**budget, **known.amounts}
        if "vram" not in budget:  # what a GPU uses is of the same memory
            amounts["ram"] = amounts.get("ram", 0) + amounts.get("vram", 0)
        return {name: amounts[name] for name in budget}, known.source

    def estimate(self, model: Model, budget: Mapping[str, int]) -> bool:
        """Estimate the needs if none are known, which may take 20 s; return whether it
        did."""
        key, source = _command_key(model), "llama-fit-params"
        if not model.has_auto_needs or key in self._known:
            return False
        amounts = fit_params_estimate(model) if model.kind == "llama-server" else {}
        if not amounts:
            source, place = "file sizes", "vram" if "vram" in budget else "ram"
            with contextlib.suppress(ConfigError):
                words = model.command(table_of(model), "0")
                size = FILES_MARGIN * size_of_files(words, model.settings.cwd)
                amounts = {"vram": 0, "ram": 0, place: int(size)}
        known = Known(model.name)
        if any(amounts.values()):
            known = Known(model.name, source, amounts)
        return self._known.setdefault(key, known) is known  # else it was just measured

    def learn(
        self, model: Model, peak: Mapping[str, int], was_squeezed: bool, is_over: bool
    ):
        """Take over the peak of a run.

        A llama-server fits itself into the room that it finds: a peak that may have
        been squeezed is ignored if it is far below what is known. Only a run that is
        over lowers what was measured, and none what was raised for want of memory.
        """
        key = _command_key(model)
        known = self._known.get(key, Known(model.name))
        amounts, source = dict(known.amounts), "measured"
        for name, amount in peak.items():
            before, need = amounts.get(name, 0), int(amount * PEAK_MARGIN)
            is_squeezed = was_squeezed and need < SQUEEZED * before
            if is_squeezed or known.source == "out of memory":
                source, amounts[name] = known.source, max(need, before)
            elif is_over or need > before or known.source != "measured":
                amounts[name] = need
        if peak:
            self._known[key] = Known(model.name, source, amounts)

    def raise_to(self, model: Model, least: Mapping[str, int]):
        """The model ran out of memory with about this much left: it needs no less."""
        key = _command_key(model)
        amounts = dict(self._known.get(key, Known()).amounts)
        for name, amount in least.items():
            amounts[name] = max(amount, amounts.get(name, 0))
        self._known[key] = Known(model.name, "out of memory", amounts)

    def save(self):
        """Write what has changed to the file."""
        with self._saving:
            rows = {key: row for key, row in [*self._known.items()]
                    if row.amounts and row.source != "out of memory"}
            if rows == self._saved:
                return
            self._saved = rows
            try:
                rows = {**self._read(), **rows}  # those of another llmswap, too
                needs = {key: row._asdict() for key, row in rows.items()}
                os.makedirs(os.path.dirname(self._path), 0o700, exist_ok=True)
                write_json(self._path, {"version": 1, "needs": needs})
            except OSError as error:
                self._log("warning", f"{self._path} could not be written: {error}")

    def _read(self):
        """Return what the file holds; a malformed one is set aside. Raise OSError."""
        rows = {}
        try:
            with open(self._path, encoding="utf-8") as file:
                document = json.load(file)
            if document["version"] != 1:
                raise ValueError(f"version {document['version']!r} is unknown")
            for key, row in document["needs"].items():
                amounts = {name: int(size) for name, size in row["amounts"].items()}
                rows[key] = Known(**{**row, "amounts": amounts})
        except FileNotFoundError:
            pass
        except MALFORMED as error:
            text = f"{self._path} cannot be read and is set aside: {error}"
            self._log("warning", text)
            with contextlib.suppress(OSError):
                os.replace(self._path, f"{self._path}.broken")
        return rows


def _command_key(model):
    """What stands for the model's command in the file."""
    text = repr((model.name, model.launch))
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


# -- what is known of a model without loading it ---------------------------------------

LOOK_TIMEOUT = 0.05  # s that a client waits for a look at files, which may be slow
LOOK_EVERY = 1.0  # s, at most, unless a model is new
INPUTS = {"vision": "image", "audio": "audio"}  # input modality by capability
GGUF_HEAD = 1 << 18  # bytes; the metadata before the tokenizer's are in them
GGUF_FACT = re.compile(  # a key of two words, the code of its type, and its value
    rb"\0[\w-]+\.(\w+)(?:\x04\0\0\0(.{4})|\x07\0\0\0([\0\1]))", re.DOTALL
)


def read_gguf(path: str) -> Dict[str, int]:
    """Return 32-bit numbers and flags among the metadata of a GGUF file, those before
    its tokenizer, by the last word of their keys. Another file has none."""
    head = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(GGUF_HEAD).partition(b"\0tokenizer.")[0]
    facts = GGUF_FACT.findall(head) if head.startswith(b"GGUF") else ()
    return {key.decode(): int.from_bytes(number or flag, "little")
            for key, number, flag in facts}


class Details(NamedTuple):
    """The facts of a model that can be told without a load.

    `options` are the values of its llama-server options by name. `problem` says why a
    start is bound to fail. `meta` and `inputs` are as llama-server would tell them.
    """

    argv: Sequence[str] = ()
    preset: str = ""
    options: Mapping[str, str] = {}
    problem: Optional[LoadFailed] = None
    inputs: Sequence[str] = ("text",)
    meta: Mapping[str, int] = {}


class Inspector:
    """Finds out the Details of models. Any thread may call; files, which may lie on
    slow mounts, are read by one of its own, and again when their size or time changes.
    """

    def __init__(self):
        self._details = {}  # by name: (model, Details)
        self._read_once = functools.lru_cache(None)(lambda path, *_: read_gguf(path))
        self._looked_at = -math.inf
        self._look = threading.Thread()  # the last look at files

    def details_of(self, models: Sequence[Model]) -> Dict[str, Details]:
        """Look at the models; return the Details by name that are known in time."""
        is_due = time.monotonic() >= self._looked_at + LOOK_EVERY
        is_due = is_due or len(self._known(models)) < len(models)
        if is_due and not self._look.is_alive():
            self._look = start_thread(self._inspect_all, "files", list(models))
            self._looked_at = time.monotonic()
        self._look.join(LOOK_TIMEOUT)
        return {**{model.name: Details() for model in models}, **self._known(models)}

    def _known(self, models):
        """Return the Details by name of those of the models that were looked at."""
        pairs = ((model, self._details.get(model.name)) for model in models)
        return {m.name: pair[1] for m, pair in pairs if pair and pair[0] is m}

    def _inspect_all(self, models):
        for model in models:
            self._details[model.name] = model, self._inspect(model)

    def _inspect(self, model):
        table, problem = table_of(model), None
        try:
            argv = model.command(table, "${PORT}")
            check_files(model, argv)
        except ConfigError as error:
            return Details(problem=LoadFailed(str(error)))
        except LoadFailed as error:
            problem = error.with_traceback(None)
        if table is None:
            return Details(argv, problem=problem)
        options, facts = table.read(argv[1:]), {}
        for name in ("--mmproj", "--model"):
            with contextlib.suppress(OSError, ValueError):
                path = os.path.join(model.settings.cwd, options.get(name, ""))
                file = os.stat(path)
                facts.update(self._read_once(path, file.st_size, file.st_mtime_ns))
        encoders = [each for each in INPUTS if facts.get(f"has_{each}_encoder")]
        inputs = ["text", *(INPUTS[each] for each in encoders)]
        trained = facts.get("context_length")
        meta = {"n_ctx": options.get("--ctx-size"), "n_ctx_train": trained}
        is_number = re.compile("[1-9][0-9]{0,8}").fullmatch
        meta = {name: int(text) for name, text in meta.items() if is_number(str(text))}
        return Details(argv, model.preset(table), options, problem, inputs, meta)


# ==================================================================================
# 5  Pool: the one lock; it carries the Scheduler's decisions out.
#    Never knows HTTP or a client's socket, and never waits while it holds the lock.
#
#    The lock guards the Scheduler and the dict of backends. It is held just long
#    enough to record an event and carry out the decisions (start a thread, wake a
#    backend's thread, fill a queue). No sleep and no I/O that may block under it, and
#    no other lock but those of a queue or a Broadcast, which no thread holds while it
#    waits.
# ==================================================================================


ADOPT_TIMEOUT = 1.0  # s; the start waits this long for systemd's list of units
LONG_WAIT = 1.0  # s; longer waits are logged
LOAD_LINE_EVERY = 10.0  # s between log lines about one load


class Broadcast:
    """Passes items to any number of followers, and keeps the last ones. A follower that
    does not keep up loses items. Any thread may call."""

    BACKLOG = 10000

    def __init__(self, history: int):
        self._history = collections.deque(maxlen=history)
        self._followers = set()
        self._lock = threading.Lock()

    def publish(self, item):
        """Hand the item to all followers without waiting for any."""
        with self._lock:
            self._history.append(item)
            for follower in self._followers:
                if follower.qsize() < self.BACKLOG:
                    follower.put(item)

    def history(self) -> list:
        """Return the last items, oldest first."""
        with self._lock:
            return list(self._history)

    @contextlib.contextmanager
    def subscribe(self, with_history: bool = True):
        """Yield `get(timeout)`: the next item, or None after the timeout."""
        follower = queue.SimpleQueue()
        with self._lock:
            for item in self._history if with_history else ():
                follower.put(item)
            self._followers.add(follower)

        def get(timeout):
            with contextlib.suppress(queue.Empty):
                return follower.get(timeout=timeout)

        try:
            yield get
        finally:
            with self._lock:
                self._followers.discard(follower)


BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # s


class Metrics(collections.Counter):
    """Counts since the start of llmswap, by (metric, label, ...); the last label of a
    histogram is the index of a bucket. The caller holds the Pool's lock."""

    def observe(self, metric: str, model: str, seconds: float):
        """Count a value of a histogram: durations, waits or loads."""
        self[metric, model, bisect.bisect_left(BUCKETS, seconds)] += 1
        self[f"{metric}_sum", model] += seconds


STOP_REASONS = {
    "evicted": "evicted for {}",
    "abandoned": "given up for {}",
    "idle": "unloaded after its idle time",
    "unload": "unloaded by hand",
    "reload": "stopped for a new configuration",
    "shutdown": "stopped at the end",
}


class ModelStatus(NamedTuple):
    """One model at one moment. Times in seconds, memory in bytes."""

    id: str
    aliases: Sequence[str] = ()
    description: str = ""
    kind: str = "llama-server"
    state: str = "unloaded"  # a value of State
    seconds: Optional[float] = None  # for so long; None: since the start
    progress: Optional[float] = None  # of a load: 0 to 1
    rss: Optional[int] = None
    vram: Optional[int] = None
    running: int = 0
    waiting: int = 0
    unload_in: Optional[float] = None
    tokens_per_second: Optional[float] = None  # of the last answer
    context: Optional[int] = None  # the size of its saved contexts; None: not saved
    context_seconds: float = 0.0  # what they have spared
    failure: Optional[APIError] = None  # why its last run failed
    stopped: Optional[str] = None  # why it was stopped
    pinned: bool = False  # nothing may evict it now
    unusable: Optional[str] = None  # what is wrong in the file
    shares: Optional[str] = None  # the model whose backend it uses now, and its state
    pid: Optional[int] = None
    port: Optional[int] = None
    entry: Mapping[str, object] = {}  # the last of its own /v1/models
    needs: Mapping[str, int] = {}
    needs_source: Optional[str] = None
    holds: Mapping[str, int] = {}  # what it takes of the budget now


class Run:
    """What the Pool records of one run of a backend."""

    def __init__(self, number: int, had_neighbours: bool):
        self.number = number  # the Scheduler's
        self.had_neighbours = had_neighbours  # other models were held during the load
        self.peak = {}  # memory by resource
        self.next_load_line = LOAD_LINE_EVERY  # seconds after the start


class Pool:
    """Owns all backends and leases them to requests. Any thread may call;
    `log(level, text)` must not block."""

    def __init__(self, config: Config, log, make_backend=None, clock=time.monotonic):
        self.config = config
        self.events = Broadcast(0)
        self.inspector = Inspector()
        self._contexts = ContextStore()
        self._log = log
        self._clock = clock
        self._make_backend = make_backend or self._backend_of_kind
        self._backends = {}
        self._outputs = {}  # by model: Broadcast of lines
        self._samples = {}  # by function that measures memory: when, and the result
        self._entries = {}  # by model: the last from its own /v1/models
        self._metrics = Metrics()
        self._speeds = {}  # by model: tokens per second of the last answer
        self._stop_reasons = {}  # by model, of its last stop
        self._revision = 0  # counts the changes of status and metrics
        self._lock = threading.Lock()
        self._timer = threading.Condition(self._lock)  # `_timer_at` came nearer
        self._changed = threading.Condition(self._lock)  # a new revision
        self._timer_at = math.inf  # when the timer decides again
        self._needs = Needs(config.settings.state_dir, log)
        self._machine_budget = None  # measured when a budget is `auto`
        self._vram_at_start = None  # its vram; None if models ran already
        self.budget = self._find_budget(config)  # with figures for `auto`
        self._known_needs = {}  # by model: amounts and their source
        self._scheduler = Scheduler(*self._limits_and_specs())
        self._preparations = {}  # by model, of a look before its start: its outcome
        self._runs = {}  # by backend
        self._methods = {  # which carry decisions out; they return True if that failed
            Grant: self._grant,
            Refuse: self._refuse,
            Start: self._start,
            Stop: self._stop,
        }
        self._has_loaded = threading.Event()  # since the last measurement
        self._is_closed = False
        self._last_request_at = clock()

    def start(self):
        """Start the timer, adopt units that run, and load the models of
        load-on-startup and keep-loaded."""
        GUARD.start()
        self._contexts.configure(self.config)
        self._scheduler.is_keep_loaded_paused = True  # load-on-startup comes first
        self._timer_thread = start_thread(self._timer_loop, "timer")
        start_thread(self._measure_loop, "memory")
        start_thread(self._adopt_units, "units").join(ADOPT_TIMEOUT)
        start_thread(self._load_wanted, "startup", True)

    def _load_wanted(self, is_start):
        """Load the models of keep-loaded, and of load-on-startup first if it is time
        for them. Estimates may take seconds."""
        models = [*self.config.models.values()]
        for model in models:
            if is_start and model.settings.load_on_startup:
                with contextlib.suppress(APIError):  # it is logged already
                    self.load(model)
        for model in models:
            if model.settings.keep_loaded and not model.problem:
                self._estimate(model)
        with self._event():
            self._scheduler.is_keep_loaded_paused = False

    def _adopt_units(self):
        """Adopt the units that run already."""
        units = {model.settings.unit for model in self.config.models.values()} - {""}
        running = running_units(units, gives_up=lambda: self._is_closed)
        with self._event() as now:
            for name, model in self.config.models.items():
                unit = model.settings.unit
                owned = {each.model.settings.unit for each in self._backends.values()}
                is_free = unit in running - owned and name not in self._backends
                if is_free and not (model.problem or self._is_closed):
                    self._log("info", f"{name}: {unit} runs already")
                    run = self._scheduler.adopted(name, now)
                    self._new_backend(name, run).adopt()

    # -- requests --------------------------------------------------------------------

    @contextlib.contextmanager
    def lease(self, model: Model, disconnected: Callable, **kind):
        """Yield a ready backend of the model; load it if need be. It is not evicted
        before the block ends, unless the lease is preemptible: for `kind` see Ticket.

        Raise an APIError if there is none, or ClientDisconnected once `disconnected()`
        is true, which is called every POLL_INTERVAL.
        """
        while True:
            self._check_start(model, disconnected)
            ticket = self._submit(model, **kind)
            try:
                backend = _await_item(ticket.waiter, disconnected)
                while (is_reachable := backend.is_reachable()) is None:
                    if disconnected():
                        raise ClientDisconnected
                if is_reachable:
                    yield backend
                    return
            finally:
                with self._lock:  # as _event(), but faster
                    self._last_request_at = now = self._clock()
                    self._scheduler.finish(ticket, now)
                    self._schedule()

    def _submit(self, model, **kind):
        """Queue a ticket; its `waiter` gets the backend, or an APIError."""
        with self._lock:  # as _event(), but faster
            self._last_request_at = now = self._clock()
            name = self._scheduler.choose(model.backends).name
            ticket = self._scheduler.submit(name, now, **kind)
            ticket.waiter = queue.SimpleQueue()
            self._schedule()
        return ticket

    def _check_start(self, model, disconnected=lambda: False):
        """Raise an APIError if a start must fail, before models are evicted for it, or
        ClientDisconnected. Needs that are not known are estimated, which may take 20 s.
        """
        if model.problem:
            raise ModelMisconfigured(model.problem)
        with self._lock:
            scheduled = self._scheduler.choose(model.backends)
            owner = self.config.models.get(scheduled.name)
            if owner is None or scheduled.is_held:
                return
            new = queue.SimpleQueue()  # for all that wait for this model
            outcome = self._preparations.setdefault(owner.name, new)
        if outcome is new:
            try:
                start_thread(self._prepare, "prepare", owner, scheduled, outcome)
            except RuntimeError:  # no more threads can be started
                self._prepare(owner, scheduled, outcome)
        _await_item(outcome, disconnected)

    def _prepare(self, model, scheduled, outcome):
        problem = None
        try:
            check_start(model)
            self._estimate(model)
        except Exception as error:  # also a bug, or no descriptor is left
            problem = error
        with self._lock:
            del self._preparations[model.name]
            if isinstance(problem, LoadFailed):
                self._log("error", f"{model.name} could not be started: {problem}")
                if not scheduled.is_held:
                    scheduled.last_failure = problem
        outcome.put(problem)

    def keep_alive(self, model: Model, seconds: float):
        """Unload the model after this many idle seconds; below 0: never."""
        with self._event():
            name = self._scheduler.choose(model.backends).name
            self._scheduler.keep_alive(name, seconds)

    # -- operators -------------------------------------------------------------------

    def load(self, model: Model) -> bool:
        """Begin to load the model, without back-off; False if it is in memory."""
        if self.backend_of(model, State.LOADING, State.LOADED):
            return False
        self._check_start(model)
        self._submit(model, manual=True)
        return True

    def unload(self, model: Model) -> bool:
        """Begin to unload the model: False if there is nothing to unload."""
        problem = ModelUnloaded(f"{model.name!r} was unloaded by hand")
        with self._event() as now:
            name = self._scheduler.choose(model.backends).name
            return self._scheduler.unload(name, now, problem)

    def unload_all(self, why: str):
        """Begin to unload every model, and keep none loaded until the next request."""
        problem = ModelUnloaded(f"all models were unloaded {why}")
        with self._event() as now:
            self._scheduler.unload_all(now, problem)

    def await_unloaded(self, is_over: Callable[[], bool]):
        """Wait until no backend is being unloaded by hand, or is_over() is true."""
        while not is_over():
            with self._lock:
                held = self._scheduler.held.values()
                if all(scheduled.unload_by is None for scheduled in held):
                    return
                self._changed.wait(POLL_INTERVAL)

    def reload(self, config: Config):
        """Take over a configuration: see Scheduler.configure."""
        budget = self._find_budget(config)
        with self._event():
            before = self.config.models
            changed = [name for name, model in config.models.items()
                       if name in before and model.launch != before[name].launch]
            self.config, self.budget = config, budget
            unchanged = config.models.keys() - set(changed)
            for name in self._entries.keys() - unchanged:
                del self._entries[name]
            for name, backend in self._backends.items():
                model = config.models.get(name, backend.model)
                if model.launch == backend.model.launch:
                    backend.model = model
            self._scheduler.configure(*self._limits_and_specs(), changed)
        self._contexts.configure(config)
        start_thread(self._adopt_units, "units")
        start_thread(self._load_wanted, "keep-loaded", False)
        self.events.publish({"model": "*", "event": "models_reload"})

    # -- memory ----------------------------------------------------------------------

    def _find_budget(self, config):
        """Return the budget with figures for `auto`, measured once by the vendor's
        tool: later, our own models hold memory. The lock is not held."""
        written = config.settings.budget
        if None not in written.values():
            return written
        if self._machine_budget is None:
            groups = {backend.pid for backend in [*self._backends.values()]}
            units = {model.settings.unit for model in config.models.values()} - {""}
            is_own = functools.partial(belongs_to, groups=groups, units=units)
            self._machine_budget = machine_budget(is_own)
            self._vram_at_start = None if groups else self._machine_budget.get("vram")
        budget = with_machine_budget(written, self._machine_budget)
        self._log("info", f"budget: {resources_text(budget)}")
        return budget

    def _estimate(self, model):
        """Estimate the needs of the model if unknown, which may take seconds."""
        if self._needs.estimate(model, self.budget):
            with self._event():
                self._update_needs()

    def _limits_and_specs(self):
        """Return what may be loaded together, and the specs of all models, with the
        needs known now."""
        models, settings = self.config.models, self.config.settings
        known = {name: self._needs.of(models[name], self.budget) for name in models}
        self._known_needs = known if self.budget else {}
        amounts = {name: needs for name, (needs, _) in known.items()}
        needs = counted_needs(self.config, self.budget, amounts)
        specs = {
            name: spec_of(model, needs[name])
            for name, model in models.items() if model.backends == (name,)
        }
        addresses = {each: 1 for spec in specs.values() for each in spec.needs}
        written = {name: getattr(settings, name) for name in Limits()._asdict()}
        budget = {**addresses, **self.budget}
        return Limits(**{**written, "budget": budget}), specs

    def _update_needs(self):
        """Tell the Scheduler the needs that are measured or estimated, as known now.
        The lock is held."""
        _, specs = self._limits_and_specs()
        for name, spec in specs.items():
            if self.config.models[name].has_auto_needs:
                self._scheduler.learn(name, spec.needs)

    def _measure_loop(self):
        """Measure whenever a model has been loaded, and then once a minute."""
        interval = None
        while not self._is_closed:
            self._has_loaded.wait(interval)
            self._has_loaded.clear()
            interval = MEASURE_INTERVAL if self._measure() else None

    def _measure(self):
        """Measure the memory of the loaded backends with `auto` needs, and learn from
        it what they need; return False if there are none."""
        with self._lock:
            held = [*self._scheduler.held.values()]
            loaded = [self._backends[e.name] for e in held if e.state is State.LOADED]
        backends = [backend for backend in loaded if backend.model.has_auto_needs]
        if not backends:
            return False
        is_alone = len(held) == 1 and held[0].started_at > -math.inf  # not adopted
        on_gpu, taken = gpu_memory_by_group(), {}
        for backend in backends:
            vram = on_gpu.get(backend.pid)
            if vram is None and is_alone and self._vram_at_start:
                # in a container, the tool may show no processes
                left = machine_budget().get("vram")
                vram = left and max(0, self._vram_at_start - left)
            taken[backend] = memory_taken(backend.pid, vram)
        with self._event():
            if is_alone and len(self._scheduler.held) > 1:
                return True
            for backend in taken.keys() & self._runs.keys():
                peak = self._runs[backend].peak
                for name, amount in taken[backend].items():
                    peak[name] = max(amount, peak.get(name, 0))
                self._learn(backend, is_over=False)
            self._update_needs()
        self._needs.save()
        return True

    def _learn(self, backend, is_over):
        model, run = backend.model, self._runs[backend]
        amounts, source = self._needs.of(model, self.budget)
        is_too_large = source == "llama-fit-params" and any(
            amount > self.budget[name] for name, amount in amounts.items()
        )
        was_squeezed = run.had_neighbours or is_too_large
        self._needs.learn(model, run.peak, was_squeezed, is_over)

    # -- status ----------------------------------------------------------------------

    def backend_of(self, model: Model, *states: State):
        """Return the backend of the model, which may exit at any time, or None; also
        None if it is in none of the given states, or about to stop."""
        with self._lock:
            scheduled = self._scheduler.choose(model.backends)
            if states and (scheduled.is_stopping_soon or scheduled.state not in states):
                return None
            return self._backends.get(scheduled.name)

    def status(self, model: Model) -> ModelStatus:
        """Return the status of the model."""
        with self._lock:
            return self._status(model)

    def statuses(self, with_memory: bool = False) -> List[ModelStatus]:
        """Return the status of every model; `with_memory` reads /proc."""
        with self._lock:
            statuses = [self._status(model) for model in self.config.models.values()]
        if not with_memory:
            return statuses
        resident = self._recent(resident_by_group, 1.0)
        on_gpu = self._recent(gpu_memory_by_group, 5.0)
        return [each._replace(rss=resident.get(each.pid), vram=on_gpu.get(each.pid))
                for each in statuses]

    def _recent(self, measure, seconds):
        """Return a result of measure() that is at most so many seconds old."""
        measured_at, amounts = self._samples.get(measure, (-math.inf, None))
        if time.monotonic() > measured_at + seconds:
            amounts = measure()
            self._samples[measure] = time.monotonic(), amounts
        return amounts

    def _status(self, model):
        now, scheduled = self._clock(), self._scheduler.choose(model.backends)
        name, state, changed_at = scheduled.name, scheduled.state, scheduled.changed_at
        backend = self._backends.get(name)
        unload_at = scheduled.unload_at() if state is State.LOADED else math.inf
        needs, source = self._known_needs.get(name, ({}, None))
        usage = scheduled.usage().needs if scheduled.is_held else {}
        return ModelStatus(
            id=model.name,
            aliases=model.aliases,
            description=model.settings.description,
            kind=model.kind,
            state=state.value,
            seconds=None if changed_at is None else now - changed_at,
            progress=backend.progress if state is State.LOADING else None,
            running=scheduled.in_flight + scheduled.preemptible,
            waiting=scheduled.waiting,
            unload_in=None if unload_at == math.inf else max(0.0, unload_at - now),
            tokens_per_second=self._speeds.get(name),
            context=self._contexts.size_of(model.context_dir),
            context_seconds=self._metrics["context_seconds", name],
            failure=scheduled.last_failure,
            stopped=self._stop_reasons.get(name),
            pinned=scheduled.is_pinned,
            unusable=model.problem,
            shares=None if name == model.name else name,
            pid=backend and backend.pid,
            port=backend and backend.port,
            entry=self._entries.get(name, {}),
            needs=needs,
            needs_source=source,
            holds={each: usage[each] for each in self.budget if each in usage},
        )

    def output_of(self, name: str) -> Broadcast:
        """Return the lines that the model's backends wrote and write."""
        return self._outputs.setdefault(name, Broadcast(1000))

    def counts(self) -> Dict[str, int]:
        """Return how many models there are and are held, and requests run and wait."""
        with self._lock:
            return {
                "models": len(self.config.models),
                "loaded": len(self._scheduler.held),
                "requests": self._scheduler.in_flight,
                "queued": self._scheduler.queued,
            }

    def is_alive(self, timeout: float) -> bool:
        """Whether the lock is free within `timeout` seconds (-1: no limit), and the
        timer runs."""
        if not self._lock.acquire(timeout=timeout):
            return False
        self._lock.release()
        return self._is_closed or self._timer_thread.is_alive()

    def idle_since(self) -> Optional[float]:
        """Return when the last request came or ended, on the Pool's clock; None while
        one runs or waits."""
        with self._lock:
            is_busy = self._scheduler.queued or self._scheduler.in_flight
            return None if is_busy else self._last_request_at

    def inactive_since(self) -> Optional[float]:
        """Return since when, on the Pool's clock, no request runs or waits and only
        backends of keep-loaded run; None while it is otherwise."""
        with self._lock:
            is_in_use = self._scheduler.queued or any(
                each.in_flight or each.preemptible or not each.spec.keep_loaded
                for each in self._scheduler.held.values()
            )
            if is_in_use:
                return None
            models = self._scheduler.models.values()
            ends = [each.changed_at for each in models if not each.spec.keep_loaded]
            return max([self._last_request_at, *filter(None, ends)])

    def await_change(self, seen: Optional[int], timeout: float) -> int:
        """Wait until status or metrics have changed since revision `seen`, or until the
        timeout; return the revision."""
        with self._lock:
            if self._revision == seen:
                self._changed.wait(timeout)
            return self._revision

    def count_request(
        self, model: Optional[Model], status: int, seconds: float,
        waited: Optional[float], speed: Optional[float], **amounts: Optional[int],
    ):
        """Count a request that has ended; `model` None: for none that is known.

        `waited`: seconds until its lease, None if it got none. `speed`: tokens per
        second. `amounts`: tokens_in, tokens_out, tokens_cached, bytes_in and bytes_out.
        """
        name = model.name if model else ""
        with self._lock:
            self._metrics["requests", name, status] += 1
            for metric, amount in amounts.items():
                self._metrics[metric, name] += amount or 0
            self._metrics.observe("durations", name, seconds)
            if waited is not None:
                self._metrics.observe("waits", name, waited)
            if model and speed is not None:
                self._speeds[self._scheduler.choose(model.backends).name] = speed
            self._revise()

    def metrics(self) -> Metrics:
        """Return a copy of what was counted so far."""
        with self._lock:
            return self._metrics.copy()

    def _revise(self):
        self._revision += 1
        self._changed.notify_all()

    # -- decisions carried out -------------------------------------------------------

    @contextlib.contextmanager
    def _event(self):
        """Hold the lock while an event is recorded, then decide. Yield the time."""
        with self._lock:
            yield self._clock()
            self._schedule()

    def _schedule(self):
        """Decide and carry the decisions out. The lock is held."""
        failures = [True]
        while any(failures):  # a start that fails at once is an event of its own
            decisions, deadline = self._scheduler.decide(self._clock())
            failures = [self._methods[type(each)](*each) for each in decisions]
        self._revise()
        if deadline < self._timer_at:
            self._timer_at = deadline
            self._timer.notify()

    def _grant(self, ticket):
        ticket.waiter.put(self._backends[ticket.model.name])

    def _refuse(self, ticket, problem):
        ticket.waiter.put(problem)
        if ticket.manual and problem is not ticket.model.last_failure:
            self._log("error", f"{ticket.model.name}: not loaded: {problem}")

    def _timer_loop(self):
        """Decide again at each deadline."""
        with self._lock:
            while not self._is_closed:
                seconds = max(0.0, self._timer_at - self._clock())
                self._timer.wait(min(seconds, MAX_DURATION))
                self._timer_at = math.inf
                self._schedule()

    def _start(self, name, run, is_wake):
        """Start or wake a backend; return whether that failed at once."""
        self._log("info", f"{name}: {'waking' if is_wake else 'loading'}")
        self._publish(name, "loading", event="model_status")
        try:
            if is_wake:
                self._backends[name].wake()
            else:
                self._new_backend(name, run).start()
        except (OSError, RuntimeError, ValueError) as error:  # such as: no thread left
            problem = LoadFailed(f"{name} could not be started: {error}")
            self._record_exit(name, run, problem)
            return True
        return False

    def _new_backend(self, name, run):
        """Make a backend of the model for this run."""
        backend = self._make_backend(self.config.models[name], self)
        self._backends[name] = backend
        self._runs[backend] = Run(run, len(self._scheduler.held) > 1)
        return backend

    def _backend_of_kind(self, model, listener):
        arguments = model, listener, self.config.settings.settle_timeout
        if model.context_dir:
            return LlamaServerBackend(*arguments, contexts=self._contexts)
        kinds = {"unit": UnitBackend, "remote": RemoteBackend}
        return kinds.get(model.kind, ProcessBackend)(*arguments)

    def _stop(self, name, run, cause, newcomer, to_sleep):
        self._metrics["stops", name, cause] += 1
        self._stop_reasons[name] = STOP_REASONS[cause].format(newcomer)
        reason = "by hand" if cause == "unload" else cause
        if newcomer:
            reason += f" for {newcomer}"
        action = "going to sleep" if to_sleep else "unloading"
        self._log("info", f"{name}: {action} ({reason})")
        if to_sleep:
            self._backends[name].sleep()
        else:
            self._backends[name].stop()

    def _publish(self, name, status, event="status_change", **more):
        data = {"status": status, **more}
        self.events.publish({"model": name, "event": event, "data": data})

    # -- events from backends, on their threads: see Backend -------------------------

    def on_progress(self, backend, is_new):
        name, seconds = backend.model.name, time.monotonic() - backend.started_at
        if is_new:
            stage = "text_model"  # in the words of llama.cpp's router
            value = {"stages": [stage], "current": stage, "value": backend.progress}
            self._publish(name, "loading", progress=value)
            with self._lock:
                self._revise()
        run = self._runs[backend]
        if seconds >= run.next_load_line:
            run.next_load_line = seconds + LOAD_LINE_EVERY
            why = f" ({backend.refusal})" if backend.refusal else ""
            share = percent(backend.progress)
            self._log("info", f"{name}: loading{share} after {seconds:.0f} s{why}")

    def on_loaded(self, backend):
        name, seconds = backend.model.name, time.monotonic() - backend.started_at
        with self._event() as now:
            run, models = self._runs[backend], self._scheduler.models
            evicted_for = [each.evicted_for for each in models.values()]
            took = "awake"  # by itself
            if models[name].state is State.LOADING:
                took = f"loaded in {seconds:.2f} s"
                self._metrics.observe("loads", name, seconds)
                self._metrics["swaps",] += models[name] in evicted_for
            self._scheduler.loaded(name, run.number, now)
            run.had_neighbours |= len(self._scheduler.held) > 1
        if backend.model.has_auto_needs:
            self._has_loaded.set()
        self._log("info", f"{name}: {took} ({backend.location})")

    def on_described(self, backend, entry):
        name = backend.model.name
        with self._lock:
            self._entries[name] = entry or self._entries.get(name, {})
        self._publish(name, "loaded", **({"info": entry} if entry else {}))

    def on_slept(self, backend):
        name = backend.model.name
        with self._event() as now:
            self._log_end(name, now, "asleep")
            self._scheduler.slept(name, self._runs[backend].number, now)
        self._publish(name, "sleeping")

    def on_dying(self, backend):
        with self._event() as now:
            run = self._runs[backend]
            self._scheduler.crashed(backend.model.name, run.number, now)

    def on_exited(self, backend, problem):
        name = backend.model.name
        with self._event() as now:
            if problem is None:
                self._log_end(name, now, "unloaded")
            self._learn(backend, is_over=True)
            self._record_exit(name, self._runs[backend].number, problem)
        self._needs.save()
        is_unit = backend.model.kind == "unit" and not self._is_closed
        if is_unit and problem is None and backend.died(0):
            start_thread(self._adopt_units, "units")  # it may have been restarted

    def _record_exit(self, name, run, problem):
        """A backend has exited, or could not be started. The lock is held."""
        self._runs.pop(self._backends.pop(name, None), None)
        if problem is not None:
            scheduled = self._scheduler.models[name]
            text, last = str(problem), str(scheduled.last_failure)
            lines, before = text.splitlines(), last.splitlines()
            if before and (lines[0], lines[-1]) == (before[0], before[-1]):
                text = f"{lines[0]}, as before"  # what differs is a port or a time
            self._log("error", text if text.startswith(name) else f"{name}: {text}")
            self._metrics["failures", name, scheduled.state.value] += 1
            self._stop_reasons.pop(name, None)
        victim = self._scheduler.exited(name, run, self._clock(), problem)
        if victim is not None:
            self._log("info", f"{name}: loading again once {victim} is unloaded")
            model = self.config.models.get(name)
            if model and model.has_auto_needs:  # more than fits beside the victim
                freed = self._scheduler.models[victim].usage().needs
                left = self._scheduler.left_beside(victim)
                least = {each: left[each] for each in self.budget if freed.get(each)}
                self._needs.raise_to(model, least)
        self._update_needs()
        self._publish(name, "unloaded", exit_code=problem.exit_code if problem else 0)

    def _log_end(self, name, now, state):
        """Log that the model is asleep or unloaded; for `debug` if that was quick."""
        scheduled = self._scheduler.models[name]
        seconds = now - scheduled.changed_at
        took = f" after {seconds:.1f} s" if scheduled.state is State.UNLOADING else ""
        self._log("info" if seconds >= LONG_WAIT else "debug", f"{name}: {state}{took}")

    def on_context(self, backend, kind, tokens, size, seconds):
        name = backend.model.name
        took = f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
        text = f"{kind} {tokens:,} tokens of context ({size / 1e6:,.0f} MB) in {took}"
        count, amount = ("context_tokens", name, kind), tokens
        if kind == "used":
            text = f"used {tokens:,} tokens of its restored context, which saves {took}"
            count, amount = ("context_seconds", name), seconds
        with self._lock:
            self._metrics[count] += amount
            self._revise()
        self._log("info", f"{name}: {text}")

    def on_line(self, backend, text):
        name = backend.model.name
        self.output_of(name).publish(text)
        level = "warning" if text.startswith("llmswap: ") else "debug"
        self._log(level, f"{name} | {text}")

    # -- shutdown --------------------------------------------------------------------

    def close(self, grace: float):
        """Refuse tickets, give requests in flight `grace` seconds, then stop all
        backends in parallel and wait for their end."""
        problem = ShuttingDown("llmswap is shutting down")
        with self._event():
            self._scheduler.close(problem)
            self._is_closed = True
            self._timer.notify()
            self._has_loaded.set()
        with self._event():
            self._changed.wait_for(lambda: not self._scheduler.in_flight, grace)
            self._scheduler.unload_all(-math.inf, problem)  # at once
            for backend in self._backends.values():
                backend.stop()  # also one that is falling asleep
        with self._lock:
            self._changed.wait_for(lambda: not self._backends)
        GUARD.close()

    def kill(self):
        """Kill every backend now, without grace; a `close` that runs then ends soon."""
        with self._event():
            self._scheduler.close(ShuttingDown("llmswap is shutting down"))
            for backend in self._backends.values():
                backend.stop(at_once=True)


def percent(progress: Optional[float]) -> str:
    """Return ", 45 %" for 0.45, and nothing if it is not known."""
    return "" if progress is None else f", {100 * progress:.0f} %"


def _await_item(items, disconnected):
    """Return the item of the queue, or raise it if it is an exception, or
    ClientDisconnected once disconnected() is true. Any number of threads may wait."""
    while True:
        try:
            item = items.get(timeout=POLL_INTERVAL)
            break
        except queue.Empty:
            if disconnected():
                raise ClientDisconnected from None
    items.put(item)
    if isinstance(item, Exception):
        raise item.with_traceback(None)  # other threads raise the same one
    return item


def spec_of(model: Model, needs: Mapping[str, int]) -> ModelSpec:
    """Return what scheduling must know of a model with these needs. A unit's address is
    a resource of which there is one: two units of one address are never together."""
    settings, problem = model.settings, model.problem
    is_bound = model.kind == "unit" and not problem
    address = {model.url(""): 1} if is_bound else {}
    return ModelSpec(
        needs={**needs, **address},
        sleep_needs={**settings.sleep_needs, **address},
        is_local=model.kind != "remote",
        is_pinned=model.is_pinned,
        is_pinned_once_loaded=settings.pin == "loaded",
        keep_loaded=settings.keep_loaded and not problem,
        can_sleep=bool(settings.sleep),
        concurrency=settings.concurrency,
        idle_timeout=settings.idle_timeout,
        stop_timeout=settings.stop_timeout,
        problem=problem and ModelMisconfigured(problem),
    )


def counted_needs(
    config: Config, budget: Mapping[str, int], known: Mapping[str, Mapping[str, int]]
) -> Dict[str, Mapping[str, int]]:
    """Return the needs that count: `known`, cut down to what the budget leaves beside
    all pinned models, so that each model can be loaded. Pinned models leave a byte, so
    that two others of unknown needs do not fit together."""
    counted, left = {}, dict(budget)
    for model in sorted(config.models.values(), key=lambda each: not each.is_pinned):
        counted[model.name] = {
            name: min(amount, max(0, left[name] - 1 if model.is_pinned else left[name]))
            for name, amount in known[model.name].items()
            if name in left
        }
        if model.is_pinned:
            for name, amount in counted[model.name].items():
                left[name] -= amount
    return counted


# ==================================================================================
# 6  Relay: sends one request to a backend, and its answer to the client.
#    Never knows models, the configuration or the Pool.
#
#        client ──> Request, Body ──> relay() ──> Upstream ──> UpstreamResponse
#        client <── ClientResponse <────────── pieces <────────────────┘
#
#    `answer` is the backend's, `response` the client's. Only JSON, and forms up to the
#    model, are held in memory. Whenever a socket has blocked for POLL_INTERVAL, a
#    StallMonitor is called.
# ==================================================================================

MAX_HEAD = 65536  # bytes; as nginx's four buffers of 16 KB
MAX_HEADER_LINES = 100  # header lines; as Apache's LimitRequestFields
MAX_CHUNK_LINE = 4096  # bytes of a line between chunks
HEAD_SECONDS = 10.0  # for a whole head once its first byte is there
STALL_SECONDS = 60.0  # without a byte in the middle of a body; as nginx
SMALL_BODY = 1 << 20  # bytes of a body that are held even if they are not needed
READ_SIZE = 1 << 11  # bytes read at once of heads, and held by each waiting stream
BUFFER_SIZE = 1 << 18  # bytes read at once of other bodies
EXCERPT_SIZE = 1 << 11  # bytes kept of an answer's start and end; a zero byte between
EARLY_HEAD_AFTER = 3.0  # s of waiting; a failure before that has its own HTTP status
COMMENT_EVERY = 10.0  # s; no known client gives up before 30 s of silence
STALL_CHECK_AFTER = 5.0  # s of silence until a backend is checked for a hang

HOP_BY_HOP = frozenset(
    "connection keep-alive proxy-connection te trailer transfer-encoding upgrade "
    "proxy-authenticate proxy-authorization expect".split()
)

SERVER_HEADER = ("server", "llmswap (llama.cpp)")  # clients look for "llama.cpp"
JSON_TYPE = ("content-type", "application/json; charset=utf-8")
Headers = List[Tuple[str, str]]


# -- sockets ---------------------------------------------------------------------------

_TIMEOUTS = (BlockingIOError, TimeoutError, socket.timeout)  # after POLL_INTERVAL
_HANG_UP = getattr(select, "POLLRDHUP", select.POLLHUP)  # closed, or its sending half


class StallMonitor:
    """Call it after each POLL_INTERVAL without progress: it calls `on_tick()` and, once
    `seconds` have passed, `on_stall()`, and raises what that returns, if anything."""

    def __init__(self, seconds, on_stall=ClientDisconnected, on_tick=lambda: None):
        self._seconds, self._on_stall, self._on_tick = seconds, on_stall, on_tick
        self.restart()

    def restart(self):
        """Count the seconds from now, as there was progress."""
        self._end = time.monotonic() + self._seconds

    def __call__(self):
        self._on_tick()
        if time.monotonic() > self._end:
            self.restart()
            if problem := self._on_stall():
                raise problem


def send_all(sock: socket.socket, data, monitor: StallMonitor):
    """Send all of `data`; call `monitor` after each POLL_INTERVAL without progress."""
    left = memoryview(data)
    while len(left):
        monitor.restart()
        sent = 0
        while not sent:
            try:
                sent = sock.send(left)
            except _TIMEOUTS:
                monitor()
        left = left[sent:]


class SocketReader:
    """Reads one connection through a buffer, on one thread. `on_timeout()` is called
    whenever POLL_INTERVAL passes without a byte; it may raise."""

    def __init__(self, sock: socket.socket, on_timeout=lambda: None):
        self.sock = sock
        self.on_timeout = on_timeout
        self.buffer = b""  # received and not used yet; READ_SIZE or a little more
        self.is_untouched = True  # no byte of a head was ever received

    def recv(self, size=READ_SIZE) -> bytes:
        """Return the next bytes, at most `size`; b"" at the end of the stream."""
        if not self.buffer:
            return self._receive(size)
        piece, self.buffer = self.buffer[:size], self.buffer[size:]
        return piece

    def _receive(self, size):
        while True:
            try:
                return self.sock.recv(size)
            except _TIMEOUTS:
                self.on_timeout()

    def line(self, pattern: "re.Pattern") -> "re.Match":
        """Read a line that matches the pattern. Raise BadRequest, EOFError."""
        while b"\n" not in self.buffer and len(self.buffer) < MAX_CHUNK_LINE:
            piece = self._receive(READ_SIZE)
            if not piece:
                raise EOFError("the connection closed between two chunks")
            self.buffer += piece
        match = pattern.match(self.buffer)
        if not match:
            raise BadRequest(f"chunks or trailer malformed at {self.buffer[:40]!r}")
        self.buffer = self.buffer[match.end() :]
        return match

    def head(self) -> bytes:
        """Return a whole head with its blank line; b"" if the stream ends before it.
        Raise HeadersTooLarge, and BadRequest as soon as the bytes cannot be a head."""
        data, received, searched = b"", 0, 0
        while piece := self.recv():
            self.is_untouched = False
            received += len(piece)
            data = _EMPTY_LINES.sub(b"", data + piece)  # some send one after a body
            lines, blank_line, rest = data.partition(b"\r\n\r\n")
            if received - len(rest) > MAX_HEAD:
                raise HeadersTooLarge(f"the head is larger than {MAX_HEAD} bytes")
            if blank_line:
                self.buffer = rest + self.buffer
                return lines + blank_line
            if _ILLEGAL_IN_HEAD.search(data, searched):
                text = "this is not HTTP/1 in lines that end with CRLF"
                raise BadRequest(f"{text}; is it TLS (https://)?")
            searched = max(0, len(data) - 3)
            self.on_timeout()  # limits a head that is sent byte by byte, too
        return b""


# -- heads -----------------------------------------------------------------------------

_EMPTY_LINES = re.compile(rb"\A(?:\r\n)+")
_ILLEGAL_IN_HEAD = re.compile(rb"(?<!\r)\n|\r(?=[^\n])|[\x00-\x08\x0b\x0c\x0e-\x1f]")
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_TEXT = r"[\t\x20-\x7e\x80-\xff]*"
_HEADER_LINE = rf"({_TOKEN}):({_TEXT})\r\n"
_HEADER_LINES = re.compile(rf"(?m)^{_HEADER_LINE}")
_VERSION = r"HTTP/1\.(?P<minor>[01])"
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([!-~\x80-\xff]+) {_VERSION}")
_STATUS_LINE = re.compile(rf"{_VERSION} ([1-5][0-9][0-9])(?: {_TEXT})?")
_FRAMING = re.compile("content-length: ([0-9]{1,18})|transfer-encoding: chunked|")
_FRAMED_BY = frozenset(("content-length", "transfer-encoding"))


def as_chunk(piece) -> bytes:
    """Return bytes as a chunk of a body; no bytes give the chunk that ends it."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def render_head(start: str, headers: Headers) -> bytes:
    """Return the bytes of a head."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
    return f"{start}\r\n{lines}\r\n".encode("latin-1")


def end_to_end(head: "MessageHead", dropped: FrozenSet[str] = frozenset()) -> Headers:
    """Return the headers without the hop-by-hop ones and those to be dropped."""
    named = map(str.strip, head.connection.split(","))
    dropped = dropped.union(HOP_BY_HOP, named)
    return [header for header in head.headers if header[0] not in dropped]


def is_event_stream(headers: Mapping[str, str]) -> bool:
    """Return whether a payload with these headers is a readable stream of events."""
    kind = headers.get("content-type", "").lower()
    coding = headers.get("content-encoding", "identity")
    return kind.startswith("text/event-stream") and coding == "identity"


class MessageHead:
    """A head of strict HTTP/1: no folding, no bare CR or LF, no blank before a colon.
    Raise BadRequest, HeadersTooLarge.

    `headers` have names in lower case; those of the framing are in `length`, which is
    `default` without them, and `is_chunked`. A body with neither ends with the
    connection. `is_persistent`: the connection may go on (of HTTP/1.0: never).
    """

    def __init__(self, raw: bytes, start_line: "re.Pattern", default: Optional[int]):
        start, _, lines = raw.decode("latin-1").partition("\r\n")
        self.start = start_line.fullmatch(start)
        if not self.start:
            raise BadRequest(f"not an HTTP/1 start line: {start[:200]!r}")
        fields = _HEADER_LINES.findall(lines)
        if len(fields) + 1 != lines.count("\n"):
            raise BadRequest("a header line is malformed")
        if len(fields) > MAX_HEADER_LINES:
            raise HeadersTooLarge(f"more than {MAX_HEADER_LINES} header lines")
        self.headers, framing = [], []
        for name, value in fields:
            header = name.lower(), value.strip("\t ")
            (framing if header[0] in _FRAMED_BY else self.headers).append(header)
        known = _FRAMING.fullmatch("\n".join(map(": ".join, framing)).lower())
        if not known:
            text = "a body needs one Content-Length, or Transfer-Encoding: chunked"
            raise BadRequest(text)
        self.length = int(known[1]) if known[1] else None if framing else default
        self.is_chunked = bool(framing) and not known[1]
        self.is_http_10 = self.start["minor"] == "0"
        self._first_values = dict(reversed(self.headers))
        self.connection = ", ".join(self.all("connection")).lower()
        self.is_persistent = "close" not in self.connection and not self.is_http_10

    def get(self, name: str) -> str:
        """Return the first value of a header, or an empty string."""
        return self._first_values.get(name, "")

    def all(self, name: str) -> List[str]:
        """Return all values of a header."""
        return [value for header, value in self.headers if header == name]


class Request(MessageHead):
    """The head of a client's request."""

    def __init__(self, raw: bytes):
        super().__init__(raw, _REQUEST_LINE, 0)
        self.method, self.target = self.start[1], self.start[2]
        self.is_safe = self.method in ("GET", "HEAD", "OPTIONS")
        if self.is_http_10 and self.is_chunked:
            raise BadRequest("HTTP/1.0 has no Transfer-Encoding")
        hosts = self.all("host")
        if len(hosts) > 1 or not (hosts or self.is_http_10):
            raise BadRequest("a request must have one Host")
        if not self.target.startswith("/"):  # no proxy's URL, no asterisk
            raise BadRequest("the target must be a path")
        self.path, _, self.query = self.target.partition("?")
        # other upgrades (Java's to HTTP/2) are ignored, as RFC 9110 allows
        is_asked = "upgrade" in self.connection and self.method == "GET"
        self.is_upgrade = is_asked and self.get("upgrade").lower() == "websocket"

    def parameter(self, name: str) -> Optional[str]:
        """Return the first value of a query parameter, or None."""
        if not self.query:
            return None
        query = self.query.encode("latin-1").decode("utf-8", "replace")
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
        return next((value for key, value in pairs if key == name), None)


# -- bodies ----------------------------------------------------------------------------

_LENIENT = json.JSONDecoder(strict=False)  # allows line feeds in strings
_MAY_BE_JSON = re.compile(rb"[\s\xef\xbb\xbf]*(?:\{|\Z)")
_BOUNDARY = re.compile(r'(?i)boundary=(?:"([^"]+)"|([^\s;]+))')
_MODEL_PART = (  # the head of a form's part of that name, behind the boundary
    rb"\r\n(?=(?:[^\r\n]+\r\n){0,20}?(?i:content-disposition):[^\r\n]*"
    rb'[; ](?i:name="?model"?)[ \t]*[;\r])(?:[^\r\n]+\r\n){0,20}\r\n'
)
_CHUNK_SIZE = re.compile(rf"([0-9A-Fa-f]{{1,15}})[ \t]*(?:;{_TEXT})?\r\n".encode())
_CHUNK_END = re.compile(rb"\r\n")
_TRAILER = re.compile(rf"{_HEADER_LINE}|\r\n".encode())


def read_payload(
    reader: SocketReader, head: MessageHead, held_back=0
) -> Iterable[bytes]:
    """Yield the payload after a head as it arrives, but a chunk of at most `held_back`
    bytes in one piece. Raise BadRequest, and EOFError if it ends too early."""
    if head.is_chunked:
        while size := int(reader.line(_CHUNK_SIZE)[1], 16):
            yield from _read_exactly(reader, size, held_back)
            reader.line(_CHUNK_END)
        for _ in range(MAX_HEADER_LINES):
            if reader.line(_TRAILER)[0] == b"\r\n":
                return
        raise BadRequest(f"more than {MAX_HEADER_LINES} lines of a trailer")
    if head.length is not None:
        yield from _read_exactly(reader, head.length)
    else:
        yield from iter(functools.partial(reader.recv, 8 * READ_SIZE), b"")


def _read_exactly(reader, left, held_back=0):
    held = b""
    while left:
        piece = reader.recv(min(left, BUFFER_SIZE))
        if not piece:
            raise EOFError(f"the connection closed {left} bytes before the end")
        left -= len(piece)
        held += piece
        if not left or len(held) > held_back:
            yield held
            held = b""


class Body:
    """A client's request body: `held` was read already, `rest` yields the remainder.

    `coding` is its content coding, "" once decoded. Reading raises ClientDisconnected,
    BadRequest, PayloadTooLarge or RequestTimeout, after which it cannot be read on; the
    constructor raises UnsupportedCoding or PayloadTooLarge.
    """

    model = None  # that it names, once `find_model` was called
    is_json = False  # a JSON object, with these members
    members: Mapping[str, object] = {}
    span = (0, 0)  # of the bytes in which a form has the model

    def __init__(self, reader: SocketReader, request: Request, limit: int):
        self._reader, self._limit = reader, limit
        self._pieces = read_payload(reader, request)
        self.length = request.length
        self.is_complete = self.length == 0
        coding = request.get("content-encoding").lower()
        self.coding = "" if self.is_complete else coding
        if self.coding not in ("", "gzip", "deflate"):
            text = f"the content coding {self.coding!r} is not supported"
            raise UnsupportedCoding(f"{text}, only gzip and deflate")
        self._check_size(self.length or 0)
        expected = request.get("expect").lower()
        self._expects = expected == "100-continue" and not request.is_http_10
        self.held = bytearray()
        self.received = 0  # bytes of payload
        self.on_tick = lambda: None  # called before each piece, and while none comes

    def _check_size(self, size):
        if size > self._limit:
            text = f"the body exceeds {self._limit} bytes (max-body in [llmswap])"
            raise PayloadTooLarge(text)

    def hold(self, size: int) -> bool:
        """Read until `size` bytes came, or all; return whether these are all."""
        while not self.is_complete and self.received < size:
            self.held += self._next_piece()
        return self.is_complete

    def rest(self) -> Iterable[bytes]:
        """Yield what is not held as it arrives; then the body cannot be sent again."""
        while not self.is_complete:
            self.on_tick()
            yield self._next_piece()

    def _next_piece(self):
        """Return the next bytes of the payload, b"" at its end."""
        text = f"the body stalled for {STALL_SECONDS:g} s"
        stalled = functools.partial(RequestTimeout, text)
        self._reader.on_timeout = StallMonitor(STALL_SECONDS, stalled, self.on_tick)
        try:
            if self._expects:
                self._expects = False
                self._reader.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            piece = next(self._pieces, b"")
        except (OSError, EOFError):
            raise ClientDisconnected from None
        self.received += len(piece)
        self._check_size(self.received)
        self.is_complete = not piece or self.received == self.length
        return piece

    def find_model(self, content_type: str, is_needed=True):
        """Find the model that it names: JSON is read whole, a form as far as its field
        `model`. If the model is not needed, a form is read no further than SMALL_BODY,
        and what is no JSON object stays as it is."""
        if self.coding:
            self._decode()
        self.hold(1)
        if content_type.lower().startswith("multipart/form-data"):
            self._read_form(content_type, is_needed)
        elif is_needed or _MAY_BE_JSON.match(self.held):
            self._read_json(is_needed)

    def _decode(self):
        """Undo the content coding, for which the body is read whole."""
        self.hold(sys.maxsize)
        decoder = zlib.decompressobj(47)  # reads zlib's format and gzip's
        try:
            self.held[:] = decoder.decompress(bytes(self.held), self._limit + 1)
        except zlib.error as error:
            raise BadRequest(f"the content coding of the body: {error}") from None
        self._check_size(len(self.held))
        if not decoder.eof or decoder.unused_data:
            raise BadRequest("the content coding of the body ends too early or late")
        self.coding = ""

    def _read_json(self, is_needed):
        self.hold(sys.maxsize)
        try:
            members = _LENIENT.decode(str(self.held, "utf-8-sig")) if self.held else {}
            if not isinstance(members, dict):
                raise ValueError("it is another JSON value")
        except MALFORMED as error:
            if is_needed:
                raise BadRequest(f"the body is not a JSON object: {error}") from None
            return
        model = members.get("model")
        self.model = model if isinstance(model, str) else None
        self.is_json, self.members = bool(self.held), members

    def _read_form(self, content_type, is_needed):
        """Read until the part named `model` is whole."""
        boundary = _BOUNDARY.search(content_type)
        if not boundary:
            if is_needed:
                raise BadRequest("multipart/form-data without a boundary")
            return
        delimiter = b"--" + (boundary[1] or boundary[2]).encode("latin-1")
        pattern = re.compile(re.escape(delimiter) + _MODEL_PART)
        size, is_whole = SMALL_BODY, False
        while not is_whole and self.model is None:
            is_whole = self.hold(size) or not is_needed
            if part := pattern.search(self.held):
                start = part.end()
                end = self.held.find(b"\r\n" + delimiter, start - 2)
                if end >= 0:
                    self.model = self.held[start:end].decode("utf-8", "replace")
                    self.span = start, end
            size *= 4


# -- edits -----------------------------------------------------------------------------


def edited_json(members: Mapping[str, object], removed, defaults, overrides) -> bytes:
    """Return the object as JSON without the `removed` names, with `defaults` for those
    that it lacks and the `overrides`; names in their order, new ones at the end."""
    left = {key: value for key, value in members.items() if key not in removed}
    completed = merged(left, merged(dict(defaults), left))  # in the order of left
    return to_json(merged(completed, dict(overrides)))


def merged(old, new):
    """Return `new` laid over `old`; objects merge deep."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{key: merged(old.get(key), value) for key, value in new.items()}}


def to_json(value) -> bytes:
    """Return compact JSON in UTF-8, with control characters escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if not text.isascii() or "\x7f" in text:
        text = CONTROL_CHARS.sub(lambda char: f"\\u{ord(char[0]):04x}", text)
    return text.encode("utf-8", "backslashreplace")  # half a surrogate pair: \ud800


def as_event(value) -> bytes:
    """Return a server-sent event with this value as JSON."""
    return b"data: " + to_json(value) + b"\n\n"


CONTROL_CHARS = re.compile(
    "[\0-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


# -- the answer, read from the backend -------------------------------------------------


class UpstreamResponse(MessageHead):
    """A backend's final answer: the constructor reads its head, `pieces` its payload.
    `length` is that of the head, even if `method` is HEAD and no payload follows. Raise
    BackendDied, OSError."""

    def __init__(self, reader: SocketReader, method: str):
        self.reader = reader
        self.is_reusable = False  # the connection, after the end of the payload
        self.status = 100
        try:
            while self.status < 200 and self.status != 101:
                raw = self.reader.head()
                if not raw:
                    raise BackendDied("it closed the connection")
                super().__init__(raw, _STATUS_LINE, None)
                self.status = int(self.start[2])
        except (BadRequest, HeadersTooLarge) as error:
            raise BackendDied(f"its answer is not HTTP: {error}") from None
        self.is_event_stream = is_event_stream(self._first_values)
        if self.status in (101, 204, 304):
            self.length, self.is_chunked = 0, False
        self._has_payload = method != "HEAD"
        is_delimited = self.is_chunked or self.length is not None
        self.ends_with_connection = self._has_payload and not is_delimited

    def pieces(self) -> Iterable[bytes]:
        """Yield the payload as it arrives, of an event stream only whole chunks, so
        that it breaks off between events. Raise BackendDied if it ends too early."""
        held_back = SMALL_BODY if self.is_event_stream else 0
        try:
            if self._has_payload:
                yield from read_payload(self.reader, self, held_back)
        except (OSError, EOFError, BadRequest) as error:
            raise BackendDied(f"the backend broke off: {error}") from None
        if not self.ends_with_connection:
            self.is_reusable = self.is_persistent and not self.reader.buffer


# -- the answer, written to the client -------------------------------------------------


class ClientResponse:
    """One answer to one request, framed as the client can read it, with the `extra`
    headers. One thread uses it."""

    wants_events = False  # while it waits it gets an early head and comments
    is_for_anthropic = False  # whose SDK expects errors of another shape
    status = 0  # of the head; 0 until there is one
    is_early = False  # the head was sent before the backend's was known
    progress_event = None  # after an early head: returns one, or b"" for a comment
    first_at = None  # when the first piece of payload was sent
    problem = None  # why it is an error or broke off
    is_cancelled = False  # set by another thread to end the request
    sent = 0  # bytes of payload
    _head = b""  # to be sent with the first piece
    _frame = bytes  # makes what is sent from a piece of payload
    _is_delimited = True  # the client notices if the end of the payload is missing
    _is_events = False

    def __init__(self, sock: socket.socket, request: Optional[Request], extra: Headers):
        self.sock, self.extra = sock, extra
        self.excerpt = bytearray()  # the payload's first and last EXCERPT_SIZE bytes
        self.is_persistent = request is not None and request.is_persistent
        self._is_head = request is not None and request.method == "HEAD"
        self._may_chunk = not (self._is_head or request is None or request.is_http_10)
        self._comment_at = time.monotonic() + EARLY_HEAD_AFTER
        self._stall = StallMonitor(STALL_SECONDS, on_tick=self.check_cancelled)

    def start(self, status: int, headers: Headers, length: Optional[int]):
        """Set the head, which is sent with the first piece, or by `flush`."""
        self.status = status
        self._is_events = length is None and is_event_stream(dict(headers))
        self._is_delimited = length is not None or self._may_chunk
        framing = []
        if length is None and self._may_chunk:
            self._frame = as_chunk
            framing.append(("transfer-encoding", "chunked"))
        elif length is not None and status not in (101, 204, 304):
            framing.append(("content-length", str(length)))
        if status != 101 and not self.is_persistent:
            framing.append(("connection", "close"))
        start = f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"
        self._head = render_head(start, headers + self.extra + framing)

    def answer(self, payload: bytes, status=200, *headers: Tuple[str, str]):
        """Send a whole response of our own."""
        self.start(status, [*headers, SERVER_HEADER], len(payload))
        self.send(payload)
        self.end()

    def start_stream(self, content_type="text/event-stream"):
        """Begin a stream of our own; a backend's events may continue one of events."""
        headers = [("content-type", content_type), ("cache-control", "no-cache")]
        headers += [("x-accel-buffering", "no"), SERVER_HEADER]
        self.start(200, headers, None)

    def send(self, piece):
        """Send a piece of payload, after the head if that was not sent yet."""
        if self._is_head or not len(piece):
            return
        if not self.sent:
            self.first_at = time.monotonic()
        self.sent += len(piece)
        self.excerpt += piece
        if len(self.excerpt) > 2 * EXCERPT_SIZE:
            self.excerpt[EXCERPT_SIZE:-EXCERPT_SIZE] = b"\0"
        self._put(self._frame(piece))

    def end(self):
        """End the body, which is complete."""
        self._put(self._frame(b""))

    def flush(self):
        """Send the head if that was not done yet."""
        self._put(b"")

    def _put(self, data):
        if self._head:
            data, self._head = self._head + data, b""
        if not len(data):
            return
        self._comment_at = time.monotonic() + COMMENT_EVERY
        try:
            send_all(self.sock, data, self._stall)
        except (OSError, RequestCancelled):  # no reason can be sent in mid-piece
            raise ClientDisconnected from None

    def heartbeat(self):
        """Keep a waiting client from giving up, if called every POLL_INTERVAL. Raise
        ClientDisconnected, RequestCancelled."""
        if await_event(self.sock, _HANG_UP, 0):
            raise ClientDisconnected
        self.check_cancelled()
        self.flush()
        is_due = time.monotonic() >= self._comment_at
        if is_due and self.wants_events and not self.status:
            self.is_early = True
            self.start_stream()
        event = b":\n\n" if is_due else b""
        if self.progress_event and self.is_early and not self.sent:
            event = self.progress_event() or event
        if event and self._is_between_events():
            self._put(self._frame(event))

    def check_cancelled(self):
        """Raise RequestCancelled if the request was cancelled."""
        if self.is_cancelled:
            raise RequestCancelled("the request was cancelled by hand")

    def _is_between_events(self):
        sent = b"\n\n" + self.excerpt
        return self._is_events and sent.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))

    def _error_body(self, problem, error=None):
        """Return the problem, or an error of the backend, as the client's SDK expects
        it: OpenAI's or Anthropic's."""
        more = {"type": problem.type, "param": problem.param, "code": problem.code}
        body = {"error": error or {"message": str(problem), **more}}
        return {"type": "error", **body} if self.is_for_anthropic else body

    def answer_error(self, problem: APIError, *headers: Tuple[str, str]):
        """Send a whole response of our own that reports a problem."""
        if problem.retry_after is not None:
            headers += (("retry-after", str(math.ceil(problem.retry_after))),)
        if problem.may_retry is not None:
            headers += (("x-should-retry", str(problem.may_retry).lower()),)
        payload = to_json(self._error_body(problem))
        self.answer(payload, problem.status, JSON_TYPE, *headers)

    def abort(self, problem: APIError, error: Optional[dict] = None):
        """End a response that broke off so that the client notices.

        Between two events it gets one more, with the backend's `error` or the problem.
        Then the connection is closed before the end of the response, by a reset if that
        has neither a length nor chunks. After an early head alone, it ends as usual.
        """
        self.problem = problem
        has_payload = self.sent > 0
        with contextlib.suppress(ClientDisconnected):
            if self._is_between_events():
                name = b"event: error\n" if self.is_for_anthropic else b""
                self.send(name + as_event(self._error_body(problem, error)))
            if self.is_early and not has_payload:
                return self.end()
            self.flush()
        self.is_persistent = False
        if not self._is_delimited:
            linger = struct.pack("ii", 1, 0)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.sock.close()  # after a shutdown() it would end normally


# -- one request to a backend, one answer back -----------------------------------------


# As the backend gets it, in chunks if the length of the Body is unknown. With a Body
# that is not complete it can be sent only once.
UpstreamRequest = namedtuple("UpstreamRequest", "method target headers body")


def relay(
    outgoing: UpstreamRequest, backend: Backend, response: ClientResponse, transform_of
):
    """Send the request to the backend and its answer to the client; if the answer
    breaks off, so does the response.

    `transform_of(answer)` returns None, or an object like RepairStream, which changes
    the payload. Raise ClientDisconnected, and BackendDied if there was no answer: then
    the client was sent an early head at most.
    """
    upstream, path = backend.upstream, outgoing.target.partition("?")[0]
    if upstream.base_path and ".." in urllib.parse.unquote(path):
        raise BadRequest("a path below the server's base path must not contain '..'")
    monitor = StallMonitor(STALL_CHECK_AFTER, backend.report_stall, response.heartbeat)
    try:
        answer = _ask(outgoing, upstream, monitor)
    except BackendDied:
        backend.report_stall()  # its process may still run
        raise
    is_sent = outgoing.body.is_complete
    response.is_persistent = response.is_persistent and is_sent
    try:
        if answer.status == 101:
            _tunnel(answer, response)
        elif response.is_early and (answer.status != 200 or not answer.is_event_stream):
            _pass_on_as_event(answer, response)
        else:
            _pass_on(answer, backend, response, transform_of(answer))
    finally:
        if answer.is_reusable and is_sent:
            upstream.release_connection(answer.reader.sock)
        else:
            upstream.drop(answer.reader.sock)


def _ask(outgoing, upstream, monitor):
    """Send the request; return the answer, of which only the head was read. As the
    backend may have closed a kept connection, none is used for a body that can be sent
    only once."""
    while True:
        try:
            sock, was_used = upstream.connect()
        except OSError as error:
            raise BackendDied(f"the backend cannot be reached: {error}") from None
        if was_used and not outgoing.body.is_complete:
            upstream.drop(sock)
            continue
        reader = SocketReader(sock, monitor)
        try:
            _send(outgoing, upstream, sock, monitor)
            answer = UpstreamResponse(reader, outgoing.method)
            if answer.status == 101 and "upgrade" not in dict(outgoing.headers):
                raise BackendDied("it switched protocols unasked")
            return answer
        except BaseException as error:
            upstream.drop(sock)
            if not isinstance(error, (OSError, BackendDied)):
                raise
            if not (was_used and reader.is_untouched):
                raise BackendDied(f"the backend gave no answer: {error}") from None


def _send(outgoing, upstream, sock, monitor):
    headers = [("host", upstream.authority), *outgoing.headers]
    body, held = outgoing.body, outgoing.body.held
    is_chunked = body.length is None and not body.is_complete
    unread = 0 if body.is_complete or is_chunked else body.length - body.received
    if is_chunked:
        headers.append(("transfer-encoding", "chunked"))
    elif held or unread or outgoing.method in ("POST", "PUT", "PATCH"):
        headers.append(("content-length", str(len(held) + unread)))
    start = f"{outgoing.method} {upstream.base_path}{outgoing.target} HTTP/1.1"
    head = render_head(start, headers)
    if not is_chunked and len(held) < BUFFER_SIZE:
        head, held = head + held, b""  # one packet for most requests
    try:
        send_all(sock, head, monitor)
        for piece in filter(len, itertools.chain([held], body.rest())):
            send_all(sock, as_chunk(piece) if is_chunked else piece, monitor)
        if is_chunked:
            send_all(sock, as_chunk(b""), monitor)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it may have answered before it read everything


def _pass_on(answer, backend, response, transform):
    """Pass the answer on piece by piece; if it breaks off, abort the response."""
    headers = [h for h in end_to_end(answer) if not h[0].startswith("access-control-")]
    if answer.is_event_stream and not answer.get("x-accel-buffering"):
        headers.append(("x-accel-buffering", "no"))  # else nginx collects the events
    if not response.is_early:
        response.start(answer.status, headers, None if transform else answer.length)
    problem, last = None, b""
    try:
        for piece in answer.pieces():
            backend.upstream.mark_alive()
            response.check_cancelled()
            last = piece[-1:]
            ready = transform.feed(piece) if transform else piece
            if ready:
                response.send(ready)
            else:  # the client may leave, or need a comment, while events are held
                response.heartbeat()
        is_partial = answer.is_event_stream and last not in (b"", b"\n", b"\r")
        if answer.ends_with_connection and (is_partial or backend.died(0.05)):
            raise BackendDied("the backend broke off: the connection ended early")
    except BackendDied as error:
        problem = error.with_traceback(None)  # which would keep this frame alive
    if transform:
        response.send(transform.finish())
    if problem:
        backend.report_stall()
        response.abort(problem)
    else:
        response.end()


def _pass_on_as_event(answer, response):
    """Send an answer that is no event stream as an error event after an early head."""
    payload = b""
    with contextlib.suppress(BackendDied):
        for piece in answer.pieces():
            response.check_cancelled()
            payload += piece
            if len(payload) > SMALL_BODY:
                break
    text = payload[:2000].decode("utf-8", "replace")
    problem = APIError(f"the backend answered {answer.status} and no events: {text}")
    problem.status = answer.status if answer.status >= 400 else 502  # as it is counted
    error = None
    with contextlib.suppress(*MALFORMED):
        error = json.loads(payload)["error"]
    response.abort(problem, error if isinstance(error, dict) else None)


def _tunnel(answer, response):
    """Pass bytes both ways after an upgrade, until either side ends."""
    upgrade = [("connection", "upgrade"), ("upgrade", answer.get("upgrade"))]
    response.is_persistent = False
    response.start(101, end_to_end(answer) + upgrade, 0)
    response.flush()
    client, backend = SocketReader(response.sock), answer.reader
    backend.on_timeout = client.on_timeout
    upload = start_thread(_copy, "upload", client, backend)
    _copy(backend, client)
    upload.join()


def _copy(source, target):
    """Copy bytes until either connection ends; then shut both down."""
    monitor = StallMonitor(STALL_SECONDS)
    with contextlib.suppress(ClientDisconnected, OSError):
        while piece := source.recv():
            send_all(target.sock, piece, monitor)
    cut([source.sock, target.sock])


# ==================================================================================
# 7  Repair: of tool calls whose arguments are broken JSON.
#    Never knows HTTP or models.
# ==================================================================================

# Valid JSON stays as it is. Other text is read once, by a reader that accepts almost
# anything as a key, a colon or a value, and at the end closes what is open. As quotes
# within a string may lack their backslash, a quote ends the string only if JSON could
# go on behind it. Lookahead is bounded, so time is linear for any text.

MAX_OBJECTS = 32  # tried in one text

_ESCAPES = r"(\\(?:u[\da-fA-F]{4}|[\"\\%s]))|\\(['`])|[\"\\]"
_ESCAPE, _ESCAPE_IN_PATH = re.compile(_ESCAPES % "/nrt"), re.compile(_ESCAPES % "")
_DRIVE = re.compile(r"(?<![A-Za-z])[A-Za-z]:\\(?=[^\\\"'])")
_WORDS = dict.fromkeys("null none nil undefined nan inf infinity".split())
_WORDS.update(true=True, false=False)


def _scalar(text, is_cut=False):
    """Return the number, bool or None that `text`, perhaps cut, means; else `text`."""
    word, digits = text.lower().lstrip("+-"), text.rstrip(".eE+-")
    if is_cut and word:
        word = next((known for known in _WORDS if known.startswith(word)), word)
    if word in _WORDS:
        return _WORDS[word]
    for convert in (functools.partial(int, base=0), int, float):
        with contextlib.suppress(ValueError):
            if len(digits) < 300 and abs(convert(digits)) != math.inf:
                return convert(digits)
    return text


def _unescaped(raw):
    """Return the string that is meant by `raw`, the text between quotes. A backslash
    that begins no escape stands for itself, as in the regular expression \\bx and
    the path C:\\new."""
    escape = _ESCAPE_IN_PATH if _DRIVE.search(raw) else _ESCAPE
    text = escape.sub(lambda match: match[1] or match[2] or "\\" + match[0], raw)
    return json.loads(f'"{text}"', strict=False)


_CLOSERS = {"{": "}", "[": "]", "(": ")"}
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": '"“”', "‘": "'‘’"}
_REPEATED_QUOTES = re.compile(  # a string in tripled or doubled quotes
    r'''("""|\'\'\'|```)(.*?)(?:\1|\Z)|""([^"\s,:;}\])][^"]*)""''', re.DOTALL
)
# Blanks, and comments if they are few and short
_GAP = re.compile(r"\s*(?:(?:(?://|#)[^\n]{0,200}|/\*[^*]{0,200}\*/)\s*){0,4}")
_COMMAS = re.compile(rf"(?:[\s,;，；]|\.\.+|…){{0,50}}{_GAP.pattern}")
_JUNK = re.compile(r"(?s)(?:[\s\ufeff,;，；]+|\.\.+|…|(?://|#)[^\n]*|/\*.*?(?:\*/|\Z))*")
_COLON = re.compile(r"\s*(?:[:：][\s:：]*=?|=+>?|->)")
_QUOTED = r"""(?:"[^"\n]{0,200}"|'[^'\n]{0,200}'|`[^`\n]{0,200}`|“[^”\n]{0,200}”)"""
_KEY = re.compile(_QUOTED + r"\s{0,99}[:：=]")
_BARE_KEY = r"[A-Za-z_$][\w$.-]{0,99}(?: [\w$.-]{1,99})?\s{0,99}[:：](?![/\\:])"
_ANY_KEY = re.compile(rf"{_KEY.pattern}|{_BARE_KEY}")
_VALUE = re.compile(r"(?:[\"'“‘`\[{(\d.+-]|true|false|null|True|False|None)")
# A member, perhaps without its colon, a closing bracket, or the end of the text
_AFTER_COMMA = re.compile(
    rf"[}}\]]|\Z|{_QUOTED}\s{{0,99}}(?:{_VALUE.pattern}|\Z)|{_ANY_KEY.pattern}"
)
_INSIDE = re.compile(r'[^"\n{]{0,200}"\s*[,}\])]')  # the string goes on and ends later
_BARE_NAME = re.compile(r'(?:([^\s:：=,;{}\[\]"][^:：=,;{}\[\]"\n]*)|.)"?', re.DOTALL)
_NEXT_MEMBER = re.compile(rf"\s*,\s*{_KEY.pattern}")
_SCALAR = re.compile(r"([-+.\w]+)(\s*[,;，；](?!\d))?")
_BARE_STOP = re.compile(r"[\[\]{}(),;，；]|\n\s*|\Z")
_FORGOTTEN_END = re.compile(r"(,\s*|(?<=[^\s{\[(])\s*\n\s*)\Z")


class _Reader:
    """Reads one object, however broken, in one pass."""

    def __init__(self, text: str, at: int):
        self.text, self.at = text, at
        self._closers = ""  # what should close the containers that are open

    def read(self):
        """Return the container that opens at the cursor. Raise ValueError if the braces
        hold something else, and RecursionError."""
        opener = self.text[self.at]
        container = {} if opener == "{" else []
        self._closers += _CLOSERS[opener]
        self.at += 1
        while char := self._next():
            if opener == "{":
                key = self._key(char, is_first=not container)
                if key is not None:
                    self._read_value(functools.partial(container.__setitem__, key))
            elif char == ":":
                raise ValueError("a member in an array that was not closed")
            else:
                self._read_value(container.append)
        self._closers = self._closers[:-1]
        return container

    def _skip(self, pattern):
        """Go past a match at the cursor; return the character behind it."""
        self.at = pattern.match(self.text, self.at).end()
        return self.text[self.at : self.at + 1]

    def _next(self):
        """Go to the next member or item, past brackets that close nothing. Return its
        first character; "" if the container ends, with or without its bracket."""
        while (char := self._skip(_JUNK)) in ("}", "]", ")"):
            goes_on = _NEXT_MEMBER.match(self.text, self.at + 1)
            if char in self._closers and not (goes_on and self._closers == "}"):
                self.at += char == self._closers[-1]
                return ""
            self.at += 1
        return char

    def _key(self, char, is_first):
        """Read a key and its colon; return None if no value follows."""
        if char in _CLOSERS:
            self.at += 1
            return None
        is_quoted = char in _QUOTES
        if is_quoted:
            key = self._string(is_key=True)
        else:
            name = _BARE_NAME.match(self.text, self.at)
            key = _unescaped((name[1] or "").strip(" \t'`“”‘’"))
            self.at = name.end()
        colon = _COLON.match(self.text, self.at)
        after = (colon or _GAP.match(self.text, self.at)).end()
        if colon or (is_quoted and _VALUE.match(self.text, after)):
            self.at = after
            return key
        if is_first and (not is_quoted or self.text[after : after + 1] in (",", "}")):
            raise ValueError("text, or a set")
        return None

    def _read_value(self, put):
        """Read the value at the cursor, if there is one, and `put` it."""
        char = self._skip(_GAP)
        if char in _QUOTES:
            put(self._string())
        elif char in _CLOSERS:
            put(self.read())
        elif char not in ",;，；}])":
            self._read_bare(put)

    def _string(self, is_key=False):
        """Read the string at the cursor, up to its quote or where that is missing."""
        text, start = self.text, self.at + 1
        match = _REPEATED_QUOTES.match(text, self.at)
        if match and (match[1] or is_key or self._may_end(match.end())):
            self.at = match.end()
            return _unescaped(match[match.lastindex])
        quotes = _QUOTES[text[self.at]]
        tokens = re.compile(rf"(?s)\\.|[{quotes}{{}}()[\]]")
        nested = 0  # open brackets of JSON within the string, as in {"
        for token in tokens.finditer(text, start):
            char, at = token[0], token.start()
            if nested:
                nested += (char in "{[(") - (char in "}])")
            elif char in quotes:
                if is_key or self._may_end(at + 1):
                    end, self.at = at, at + 1
                    break
                before = text[max(start, at - 99) : at]
                forgotten = _FORGOTTEN_END.search(before)
                if forgotten and _KEY.match(text, at):
                    end = self.at = at - len(forgotten[0])
                    break
                nested = before.rstrip().endswith(("{", "[", "("))
        else:
            end = self.at = len(text)
            if text.count("}", start) > text.count("{", start):
                end = len(text.rstrip("}]) \t\r\n“”‘’'\""))
        return _unescaped(text[start:end])

    def _may_end(self, at, is_bare=False):
        """Return whether JSON could go on at `at`, behind a string or a bare value."""
        text, closers = self.text, self._closers
        after = _GAP.match(text, at).end()
        for _ in range(16):
            if text[after : after + 1] not in ("}", "]", ")"):
                break
            if text[after] in closers:
                closers = closers[: closers.rindex(text[after])]
            if not closers:
                return not _INSIDE.match(text, after + 1)
            at = after + 1
            after = _GAP.match(text, at).end()
        if after >= len(text) or text.startswith("```", after):
            return True
        is_comma = text[after] in ",;，；"
        if closers[-1] != "}":
            is_next = after > at and _VALUE.match(text, after)
            return is_comma or text[after] == ":" or bool(is_next)
        if is_comma:
            after = _COMMAS.match(text, after).end()
            return bool(_AFTER_COMMA.match(text, after))
        return bool((_ANY_KEY if is_bare else _KEY).match(text, after))

    def _read_bare(self, put):
        """Read a number, a word, or a string that lacks its quotes."""
        text, start = self.text, self.at
        word = _SCALAR.match(text, start)
        is_scalar = word and _scalar(word[1]) != word[1]
        if is_scalar and (word[2] or self._may_end(word.end(), is_bare=True)):
            self.at = word.end(1)
        else:
            for stop in _BARE_STOP.finditer(text, start):
                self.at = stop.start()
                if stop[0] in self._closers or self._may_end(self.at, is_bare=True):
                    break
        raw = text[start : self.at].strip()
        value = _scalar(raw, is_cut=self.at == len(text))
        if raw.strip("+-."):
            put(_unescaped(raw) if value == raw else value)


# refuses NaN: int("NaN") raises ValueError
_STRICT = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=int)
_ENCODED = re.compile(r'[^{]{0,500}\{(?:\s|\\[nrt]){0,99}\\+(?:"|u0022)')
_ENCODED_CHAR = re.compile(r'\\(?:u00[0-7][\da-fA-F]|[nrtbf"\\/])')
_NO_BRACE = re.compile(rf"""["']?[\w$ .-]{{1,99}}["']\s*:\s*{_VALUE.pattern}""")
_SCALARS = re.compile(r"\[\s*[\"'\d-]")
_QUOTED_KEY = re.compile(r"\{\s*(?:[\"'“‘`{/#]|\Z)")
_WRAPPING = re.compile(r"```\w*|<[^<>{}]{0,60}>|json|[\s\[(\"'`]+")


def _object_in(text):
    """Return the JSON text of the only object in `text`; None if there is not one."""
    text, end, objects = text.lstrip("\ufeff \t\r\n"), 0, {}
    if _NO_BRACE.match(text):
        text = "{" + text
    elif _ENCODED.match(text):
        text = _ENCODED_CHAR.sub(lambda char: json.loads(f'"{char[0]}"'), text)
    if _SCALARS.match(text):
        return None
    for _ in range(MAX_OBJECTS):
        at = text.find("{", end)
        if at < 0:
            break
        lead, value = text[max(end, at - 200) : at], None
        with contextlib.suppress(ValueError):
            value, end = _STRICT.raw_decode(text, at)
            as_json = text[at:end]
        if value is None or _NEXT_MEMBER.match(text, end):
            reader, value = _Reader(text, at), None
            with contextlib.suppress(ValueError):
                value = reader.read()
            end, as_json = reader.at, to_json(value).decode()
        is_quoted = value and _QUOTED_KEY.match(text, at)  # not code or prose
        is_announced = not _WRAPPING.sub("", lead) or lead.rstrip().endswith((":", ">"))
        if value is not None and (is_quoted or is_announced):
            objects.setdefault(to_json(value), as_json)
    else:
        return None
    if len(objects) > 1:
        objects.pop(b"{}", None)
    return objects.popitem()[1] if len(objects) == 1 else None


def repair_arguments(text: str) -> str:
    """Return the JSON text of the one object that `text` clearly means. Valid JSON
    stays as it is, and so does text that means no object or several."""
    with contextlib.suppress(RecursionError, ValueError):  # too deep, or no object
        try:
            _STRICT.decode(text)
        except ValueError:
            return _object_in(text) or text
    return text


# -- answers: those of an unknown shape stay as they are -------------------------------

CUT_OFF = {"length", "max_tokens", "model_context_window_exceeded", "content_filter"}
_TOOL_CALL = re.compile(rb'"(?:tool_calls|partial_json|tool_use)"')


def _calls_in(payload):
    """Return [(key, object, name)] of the tool calls, and {choice: finish reason} of
    the choices that end. object[name] is the text of the arguments or a fragment. The
    key is (choice, tool); of Anthropic it is (None, block), and the choice None."""
    calls, ends = [], {}
    for position, choice in enumerate(payload.get("choices") or ()):
        index = choice.get("index", position)
        message = choice.get("delta" if "delta" in choice else "message") or {}
        for at, tool in enumerate(message.get("tool_calls") or ()):
            function = tool["function"]
            if isinstance(function.setdefault("arguments", ""), str):
                calls.append(((index, tool.get("index", at)), function, "arguments"))
        if choice.get("finish_reason"):
            ends[index] = str(choice["finish_reason"])
    delta = payload.get("delta") or {}
    if isinstance(delta.get("partial_json"), str):
        calls.append(((None, payload.get("index", 0)), delta, "partial_json"))
    for at, block in enumerate(payload.get("content") or ()):
        if block["type"] == "tool_use" and isinstance(block["input"], str):
            calls.append(((None, at), block, "input"))
    reason = (delta or payload).get("stop_reason")
    if reason or payload.get("type") in ("content_block_start", "message_stop"):
        ends[None] = str(reason)
    return calls, ends


def _cut_off(calls, ends):
    """Return the calls that were cut off: the last of each choice that was."""
    last = {key[0]: key for key in calls}
    return [key for choice, key in last.items() if ends.get(choice) in CUT_OFF]


def repair_body(body: bytes) -> bytes:
    """Return a chat completion, or a message of Anthropic, with its calls repaired.
    What needs no repair is returned as it is; a call that was cut off, too."""
    if not _TOOL_CALL.search(body):
        return body
    try:
        original, payload = json.loads(body), json.loads(body)
        calls, ends = _calls_in(payload)
        cut = _cut_off([key for key, _, _ in calls], ends)
        for key, member, name in calls:
            if key not in cut:
                member[name] = text = repair_arguments(member[name])
                if name == "input" and text.startswith("{"):
                    member[name] = json.loads(text)
        for message in [choice["message"] for choice in payload.get("choices", ())]:
            if message.get("tool_calls") and message.get("content") == "":
                message["content"] = None
        return body if payload == original else to_json(payload)
    except MALFORMED:
        return body


_EVENT_END = re.compile(rb"\n\r?\n")
_DATA = re.compile(rb"(?m)^data:(.*)")


def _data_of(event):
    return b"\n".join(_DATA.findall(event)).decode()


def _with_data(event, payload):
    """Return the event with `payload` as its data and its other lines unchanged."""
    lines = [line for line in event.splitlines() if line and line[:5] != b"data:"]
    line_end = b"\r\n" if event.endswith(b"\r\n") else b"\n"
    return line_end.join([*lines, b"data: " + to_json(payload), b"", b""])


class RepairStream:
    """Repairs the tool calls in a stream of OpenAI's chunks or Anthropic's events.

    Events without a call pass at once. Fragments of arguments are held until the calls
    have ended, then sent as they came or, of a call that needs repair, with its whole
    text in the first. An answer that is no stream is held until its end.
    """

    def __init__(self):
        self._buffer = bytearray()  # the beginning of an event
        self._calls = {}  # by key of a call that is held: its fragments
        self._ends = {}  # by choice that has ended meanwhile: its finish reason
        self._held = []  # (event, keys of the calls of which it has fragments)

    def feed(self, payload: bytes) -> bytes:
        """Return the bytes that can be sent now; `payload` may end within an event."""
        start, searched, out = 0, max(0, len(self._buffer) - 2), []
        self._buffer += payload
        for match in _EVENT_END.finditer(self._buffer, searched):
            out.append(self._pass_event(bytes(self._buffer[start : match.end()])))
            start = match.end()
        del self._buffer[:start]
        return b"".join(out)

    def finish(self) -> bytes:
        """Return all that is held; a call that did not end is left as it is."""
        rest = self._pass_event(repair_body(bytes(self._buffer)))
        return self._release(is_whole=False) + rest

    def _pass_event(self, event):
        """Return the bytes to send once this event has come."""
        if not (self._calls or _TOOL_CALL.search(event)):
            return event
        try:
            text = _data_of(event)
            if text.strip() == "[DONE]":
                return self._release() + event
            payload = json.loads(text)
            if payload.get("error"):
                return self._release(is_whole=False) + event
            return self._pass_payload(event, payload)
        except MALFORMED:
            return event

    def _pass_payload(self, event, payload):
        calls, ends = _calls_in(payload)
        for key, member, name in calls:
            fragments = self._calls.pop(key, [])
            self._calls[key] = fragments  # last, as `_cut_off` needs it
            fragments.append(member[name])
        keys = [key for key, member, name in calls if member[name]]
        is_named = any(member.get("name") for _, member, _ in calls)
        if keys and is_named and not ends:  # names need not wait
            for (choice, tool), function, name in calls:
                call = {"index": tool, "function": {"arguments": function[name]}}
                lone = {"index": choice, "delta": {"tool_calls": [call]}}
                lone = {**payload, "choices": [{**lone, "finish_reason": None}]}
                self._held.append((_with_data(event, lone), [(choice, tool)]))
                function[name] = ""
            return _with_data(event, payload)
        # what follows the end of an Anthropic block says whether it was cut off
        is_end = ends or payload.get("type") == "content_block_stop"
        if keys or (is_end and self._calls):
            self._held.append((event, keys))
            self._ends.update(ends)
            event = b""
        if ends and all(choice in self._ends for choice, _ in self._calls):
            return self._release() + event
        return event

    def _release(self, is_whole=True):
        """Return what is held, with its calls repaired unless they were cut off."""
        texts = {key: "".join(parts) for key, parts in self._calls.items()}
        for key in _cut_off(texts, self._ends) if is_whole else [*texts]:
            del texts[key]
        repaired = {key: repair_arguments(text) for key, text in texts.items()}
        changed = {key for key in texts if repaired[key] != texts[key]}
        held, self._held, self._calls, self._ends = self._held, [], {}, {}
        out = []
        for event, keys in held:
            if changed.intersection(keys):
                payload = json.loads(_data_of(event))
                for key, member, name in _calls_in(payload)[0]:
                    if member[name] and key in changed:
                        member[name], repaired[key] = repaired[key], ""
                event = _with_data(event, payload)
            out.append(event)
        return b"".join(out)


# ==================================================================================
# 8  Pages: what people and Prometheus see.
#    Never knows how it is served.
#
#    The page is one text without any outside resource. It asks for `/` again, as a
#    stream of events; each of them is a whole snapshot, which replaces the last.
# ==================================================================================


def shown_on_page(model: ModelStatus) -> dict:
    """Return what the page shows of a model, ready for JSON."""
    shown = {**model._asdict(), "failure": model.failure and str(model.failure)}
    del shown["pid"], shown["port"], shown["entry"]
    return shown


def printable(text: str) -> str:
    """Return the text without colours, with control characters as \\xNN, so that a
    terminal does not obey them. Line feeds stay, tabs become blanks."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).expandtabs()
    return CONTROL_CHARS.sub(
        lambda char: char[0] if char[0] == "\n" else ascii(char[0])[1:-1], text
    )


# -- numbers in answers ----------------------------------------------------------------


class Usage(NamedTuple):
    """Numbers that an answer reports; None: it does not."""

    tokens_in: Optional[int] = None
    tokens_out: Optional[int] = None
    tokens_per_second: Optional[float] = None  # of those out
    tokens_cached: Optional[int] = None  # of those in, taken from a cache
    prompt_speed: Optional[float] = None  # of those in, per second


_USAGE_NAMES = {  # by fields of Usage; of several in an answer the last counts
    "tokens_in": "prompt_n tokens_evaluated input_tokens prompt_tokens",
    "tokens_out": "predicted_n tokens_predicted output_tokens completion_tokens",
    "tokens_per_second": "predicted_per_second",
    "tokens_cached": "cache_n cache_read_input_tokens cached_tokens",
    "prompt_speed": "prompt_per_second",
}
_USAGE_FIELDS = {
    name: field for field, names in _USAGE_NAMES.items() for name in names.split()
}
# The text that a model writes cannot match: quotes in it are escaped.
_USAGE = re.compile(
    rb'"(%b)"\s*:\s*(\d{1,15}(?:\.\d+)?(?:[eE][-+]?\d\d?)?)\s*[,}]'
    % "|".join(_USAGE_FIELDS).encode()
)


def usage_in(excerpt: bytes) -> Usage:
    """Return the numbers in the first and last bytes of an answer: JSON or events, of
    OpenAI, Anthropic or llama-server, cut anywhere.

    Of two values the last counts, and `usage` before llama-server's `timings`.
    """
    numbers = {
        name.decode(): float(text) if name.endswith(b"second") else int(float(text))
        for name, text in _USAGE.findall(excerpt)
    }
    if "input_tokens" in numbers:  # Anthropic counts without those in the cache
        numbers["input_tokens"] += numbers.get("cache_read_input_tokens", 0)
    if "prompt_n" in numbers:  # so does llama-server
        numbers["prompt_n"] += numbers.get("cache_n", 0)
    return Usage(**{
        field: numbers[name]
        for name, field in _USAGE_FIELDS.items() if name in numbers
    })


def speed_of(usage: Usage, seconds: float) -> Optional[float]:
    """Return tokens per second as reported, else as measured if it took long enough."""
    if (usage.tokens_out or 0) < 2:
        return None
    if usage.tokens_per_second is not None:
        return usage.tokens_per_second
    return usage.tokens_out / seconds if seconds > 0.05 else None


# -- Prometheus ------------------------------------------------------------------------

METRICS_TYPE = ("content-type", "text/plain; version=0.0.4; charset=utf-8")
# Kind; source, as in `cells` of metrics_text(); metric, to which llmswap_ is prefixed
# unless it begins with process_; help; labels. Without labels, a source of one number
# has none, all others have `model`.
METRICS = (
    ("gauge", "build", "build_info", "Version of llmswap.", "version", "python"),
    ("gauge", "born", "process_start_time_seconds", "Unix time of the start."),
    ("counter", "cpu", "process_cpu_seconds_total", "CPU time of llmswap."),
    ("gauge", "memory", "process_resident_memory_bytes", "Memory of llmswap."),
    ("gauge", "budget", "budget_bytes", "What all models may use.", "resource"),
    ("gauge", "needs", "model_needs_bytes", "What a model needs.", "model", "resource"),
    ("gauge", "states", "model_state", "1 for its state, else 0.", "model", "state"),
    ("gauge", "running", "requests_in_flight", "Requests that a model serves now."),
    ("gauge", "waiting", "requests_queued", "Requests that wait for a model."),
    ("gauge", "rss", "model_resident_memory_bytes", "Memory of a model's processes."),
    ("gauge", "vram", "model_gpu_memory_bytes", "GPU memory of a model's processes."),
    ("gauge", "context", "context_bytes", "Size of a model's saved contexts."),
    ("gauge", "progress", "load_progress_ratio", "Progress of a load, if known."),
    ("gauge", "tokens_per_second", "last_tokens_per_second", "Speed of last answer."),
    ("counter", "requests", "requests_total", "Ended requests.", "model", "status"),
    ("counter", "tokens_in", "prompt_tokens_total", "Prompt tokens, as reported."),
    ("counter", "tokens_out", "completion_tokens_total", "New tokens, as reported."),
    ("counter", "tokens_cached", "prompt_tokens_cached_total", "Cached prompt tokens."),
    ("counter", "bytes_in", "request_bytes_total", "Bytes of request bodies."),
    ("counter", "bytes_out", "response_bytes_total", "Bytes of response bodies."),
    ("counter", "swaps", "swaps_total", "Loads for which a model was evicted."),
    ("counter", "stops", "stops_total", "Stops of models.", "model", "cause"),
    ("counter", "failures", "failures_total", "Runs that failed.", "model", "state"),
    ("counter", "context_tokens", "context_tokens_total",
     "Tokens of contexts that were saved or restored.", "model", "action"),
    ("counter", "context_seconds", "context_seconds_saved_total",
     "Seconds of prompt processing that restored contexts saved."),
    ("histogram", "durations", "request_duration_seconds", "Time of whole requests."),
    ("histogram", "waits", "request_wait_seconds", "Time waiting for the model."),
    ("histogram", "loads", "load_duration_seconds", "Time until a model is ready."),
)


def metrics_text(
    models: Sequence[ModelStatus], metrics: Metrics, budget: Mapping[str, int], born
) -> str:
    """Return everything in Prometheus' text format, version 0.0.4. llmswap started at
    `born`, in Unix time."""
    lines, cells = [], collections.defaultdict(list)
    numbers = {("swaps",): 0, ("born",): born, **metrics, **_gauges(models, budget)}
    for (source, *values), number in numbers.items():
        cells[source].append(("", values, number))
    for kind, source, name, text, *labels in METRICS:
        name = name if name.startswith("process_") else f"llmswap_{name}"
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        labels = labels or ["model", "le"]
        is_histogram = kind == "histogram"
        samples = _buckets(metrics, source) if is_histogram else cells[source]
        for suffix, values, number in samples:
            pairs = []
            for label, value in zip(labels, values):  # JSON quotes as Prometheus does
                quoted = json.dumps(printable(str(value)), ensure_ascii=False)
                pairs.append(f"{label}={quoted}")
            inner = "{" + ",".join(pairs) + "}" if pairs else ""
            if number is not None:
                lines.append(f"{name}{suffix}{inner} {number!r}")
    return "\n".join(lines) + "\n"


def _gauges(models, budget):
    """Return {(source, values of its labels...): number or None}."""
    gauges = {
        ("build", VERSION, "{}.{}.{}".format(*sys.version_info)): 1,
        ("cpu",): time.process_time(),
        ("memory",): memory_of(os.getpid()).get("VmRSS"),
    }
    gauges.update({("budget", name): size for name, size in budget.items()})
    sources = "running waiting rss vram context progress tokens_per_second".split()
    for model in models:
        if model.shares is None:
            for source in sources:
                gauges[source, model.id] = getattr(model, source)
            for state in State:
                is_now = int(model.state == state.value)
                gauges["states", model.id, state.value] = is_now
            for name, size in model.needs.items():
                gauges["needs", model.id, name] = size
    return gauges


def _buckets(metrics, source):
    """Yield each model's cumulative buckets, their sum and their count."""
    for name, model in [key for key in metrics if key[0] == f"{source}_sum"]:
        reached = 0
        for index, bound in enumerate((*BUCKETS, "+Inf")):
            reached += metrics[source, model, index]
            yield "_bucket", (model, bound), reached
        yield "_sum", (model,), metrics[name, model]
        yield "_count", (model,), reached


# -- the status page -------------------------------------------------------------------

_STYLE = r"""
:root {
  color-scheme: light dark;
  --ground: light-dark(#f4f4f1, #111315); --sheet: light-dark(#fff, #191c1f);
  --line: light-dark(#e4e3de, #2b2f33); --edge: light-dark(#8f8e87, #6b7279);
  --ink: light-dark(#1b1d20, #e7e8ea); --soft: light-dark(#61656b, #9ba1a8);
  --accent: light-dark(#1f5fd6, #82aaff); --on-accent: light-dark(#fff, #0d1626);
  --loaded: light-dark(#14804f, #4fc78d); --loading: light-dark(#8f5b00, #e0ad4a);
  --sleeping: light-dark(#5a53c4, #a5a0f5); --failed: light-dark(#c0302b, #ff8a80);
}
* { box-sizing: border-box; margin: 0; }
[hidden], dl:empty, main section:has(ul:empty) { display: none !important; }
body {
  max-width: 1360px; margin: 0 auto; padding: 0 24px 48px; overflow-wrap: anywhere;
  background: var(--ground); color: var(--ink); font-variant-numeric: tabular-nums;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 19px; }
h2 { font-size: 13px; margin: 0 0 8px 2px; }
h3 { font-size: 15px; }
h2, small, #totals, #connection, #no-models, #stats, #thought, .about, .state, dt,
.why pre, .by, .sum, ::placeholder { color: var(--soft); opacity: 1; }
small { font-weight: 400; margin-left: 3px; }
small, .about, .state, .why p, .request, #connection, #budget { font-size: 13.5px; }
ul { list-style: none; padding: 0; overflow: hidden; }
.unseen { position: absolute; clip-path: inset(50%); }

button, a, input, select, textarea {
  padding: 4px 12px; border: 1px solid var(--line); border-radius: 8px;
  font: inherit; color: inherit; background: var(--sheet);
}
button, a {
  font-size: 13.5px; cursor: pointer; text-decoration: none; white-space: nowrap;
}
button:hover, a:hover, input, select, textarea { border-color: var(--edge); }
[aria-disabled=true] { opacity: .5; cursor: default; }
.plain { padding-inline: 8px; border-color: transparent; background: none; }
.main { background: var(--accent); color: var(--on-accent); font-weight: 600; }
input, select, textarea { width: 100%; padding-block: 8px; }
textarea { display: block; resize: vertical; min-height: 76px; }
main ul, .sheet, #no-models, dialog {
  background: var(--sheet); border: 1px solid var(--line); border-radius: 14px;
}
pre {
  overflow: auto; padding: 10px 12px; border-radius: 8px; white-space: pre-wrap;
  background: var(--ground); font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace;
}

header, .buttons, .send, #log h2, .request { display: flex; gap: 0 10px; }
header, .buttons, #log h2 { align-items: center; }
header { flex-wrap: wrap; gap: 6px 20px; padding: 20px 0 16px; }
#totals { flex: 1; }
#search { width: 200px; }
#connection::before { content: "\25cf\a0"; color: var(--loading); }
#connection.live::before { color: var(--loaded); }
.columns {
  display: grid; grid-template-columns: minmax(0, 1fr) minmax(340px, 420px);
  gap: 28px; align-items: start;
}
main section { margin-bottom: 26px; }
#problem { margin: 12px; color: var(--failed); white-space: pre-wrap; }
#no-models { padding: 72px 24px; text-align: center; }
#budget p { display: flex; margin-bottom: 10px; }
#budget span {
  flex: 0 1 0; padding: 2px 0 2px 8px;
  overflow: hidden; white-space: nowrap;
  background: var(--sheet); border-left: 3px solid var(--loaded);
}
#budget :is(:first-child, :last-child) { color: var(--soft); border: 0; }
#budget span:first-child { flex: 0 0 112px !important; }

/* One model */
.model, .request { --tone: var(--soft); border-top: 1px solid var(--line); }
.model {
  display: grid; grid-template-columns: 12px minmax(30%, 1fr) auto auto;
  gap: 0 14px; align-items: baseline; padding: 13px 14px 14px 18px;
}
main li:first-child { border: 0; }
.loaded { --tone: var(--loaded); }
.loading, .unloading { --tone: var(--loading); }
.sleeping { --tone: var(--sleeping); }
.failed, .unusable { --tone: var(--failed); }
.dot { width: 10px; height: 10px; border: 2px solid var(--tone); border-radius: 50%; }
:is(.loaded, .failed) .dot { background: var(--tone); }
:is(.loading, .unloading) .dot {
  border-right-color: transparent; animation: turn 1.1s linear infinite;
}
@keyframes turn { to { transform: rotate(1turn); } }
@media (prefers-reduced-motion: reduce) { .dot { animation: none !important; } }
.state b, .failed .sum, .why p, #error { color: var(--tone, var(--failed)); }
.buttons { gap: 0; }
.buttons :last-child { margin-left: 6px; min-width: 88px; }
.model > dl, .why, progress { grid-column: 2 / -1; }
dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(100px, 1fr));
  gap: 10px 24px; padding-top: 10px;
}
dt { font-size: 12px; }
dt::first-letter { text-transform: uppercase; }
progress { width: 100%; height: 8px; margin-top: 12px; accent-color: var(--loading); }
.why p { margin: 6px 0 8px; }
.why pre { max-height: 24em; border: 1px solid var(--line); }

/* Prompt and requests */
aside { padding-top: 27px; }
.sheet { padding: 14px; margin-bottom: 16px; }
.sheet > * + * { margin-top: 10px; }
.sheet h2, #log h2 { margin: 0 0 10px; color: inherit; font-size: 15px; }
:is(h2 :last-child, #connection) { margin-left: auto; }
#recent { max-height: 50vh; overflow: auto; margin: 0 -14px -14px; }
#recent:empty::before { content: "None"; padding: 14px; color: var(--soft); }
.request { align-items: baseline; padding: 8px 14px 9px; }
.request:not(.loading, .failed) .dot { visibility: hidden; }
details { flex: 1; min-width: 0; }
summary { display: flex; flex-wrap: wrap; gap: 0 8px; cursor: pointer; }
summary::after { content: "\203a" / ""; color: var(--soft); }
[open] summary::after { rotate: 90deg; }
.by { flex: 1; overflow-wrap: break-word; }
.sum { flex-basis: 100%; order: 1; }
details:not([open]) .sum { max-height: 2.9em; overflow: hidden; }
details dl div:last-child { grid-column: 1 / -1; white-space: pre-line; }
#answer p { white-space: pre-wrap; }
#thought { padding-left: 12px; border-left: 2px solid var(--line); }

dialog { margin: auto; width: 400px; max-width: calc(100vw - 24px); padding: 16px; }
#key-dialog form { display: grid; gap: 12px; }
#log { width: 1000px; }
#lines { height: 80vh; }

@media (max-width: 1100px) {
  body { padding: 0 14px 32px; }
  #totals, #search { order: 1; flex: 1 0 100%; }
  .columns { display: block; }
  aside { padding: 0; }
  #recent { max-height: none; }
  input, select, textarea { font-size: 16px; }
  .model { grid-template-columns: 12px minmax(0, 1fr) auto; gap: 0 10px; }
  .buttons { grid-column: 2 / -1; grid-row: 9; margin: 10px 0 0 -8px; }
  .buttons :last-child { margin-left: auto; }
  .rest .buttons { grid-area: 1 / 3; margin: 0; }
  .rest .state { grid-column: 2 / -1; }
  h3 small { display: block; margin: 0; }
}
@media (max-width: 620px) { .rest [data-do=log] { display: none; } }
"""

_SCRIPT = r"""
"use strict";

const $ = (id) => document.getElementById(id);
const rows = new Map(); // id of a model, or number of a request -> its element
let snapshot = null; // the last one, received at snapshotAt
let snapshotAt = 0;

// ---- Values for people ----

const join = (parts, by = " · ") => parts.filter(Boolean).join(by);
const speed = (n) => n && `${n < 10 ? n.toFixed(1) : Math.round(n)} tok/s`;
const count = (n) => (n < 1000 ? `${n}` : `${(n / 1000).toFixed(n < 99950 ? 1 : 0)}k`);

// as fetch() takes it in a header: a character for each byte
const utf8 = (text) => String.fromCharCode(...new TextEncoder().encode(text));

const requests = ({running, waiting}) =>
  join([running && `${running} running`, waiting && `${waiting} waiting`], ", ");

function bytes(n) {
  const gib = n / 2 ** 30;
  return n && (gib >= 1 ? `${gib.toFixed(1)} GiB` : `${Math.round(gib * 1024)} MiB`);
}

function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  const [m, h] = [Math.floor(s / 60), Math.floor(s / 3600)];
  if (m < 1) return `${s} s`;
  if (h < 1) return `${m} min ${s % 60} s`;
  return h < 48 ? `${h} h ${m % 60} min` : `${Math.floor(h / 24)} d ${h % 24} h`;
}

function shortDuration(seconds) {
  if (seconds === null) return "";
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  return seconds < 9.95 ? `${seconds.toFixed(1)} s` : duration(seconds);
}

// ---- Elements ----

const partsOf = (row) => (name) => row.querySelector(`[data-part=${name}]`);

// Set texts by name, and hide what is empty or false. An equal text is not set again,
// which would undo a selection.
function fill(find, parts) {
  for (const [name, part] of Object.entries(parts)) {
    const element = find(name), isNew = element.textContent !== part;
    if (typeof part === "string" && isNew) element.textContent = part;
    element.hidden = !part;
  }
}

function make(tag, ...children) {
  const element = document.createElement(tag);
  element.append(...children);
  return element;
}

function paintRows(ul, template, items, paintRow) {
  const {firstElementChild} = $(template).content;
  const wanted = items.map((item) => {
    if (!rows.has(item.id)) rows.set(item.id, firstElementChild.cloneNode(true));
    const row = rows.get(item.id);
    row.dataset.id = item.id;
    paintRow(row, item);
    return row;
  });
  for (const row of [...ul.children]) if (!wanted.includes(row)) row.remove();
  wanted.forEach((row, at) => {
    if (row !== ul.children[at]) ul.insertBefore(row, ul.children[at]);
  });
}

function paintList(parent, items, makeChild) {
  if (parent.dataset.items === `${items}`) return;
  parent.dataset.items = items;
  parent.replaceChildren(...items.map(makeChild));
}

function paintFacts(row, facts) {
  const shown = Object.entries(facts).filter(([, fact]) => fact);
  paintList(row.querySelector("dl"), shown, ([name, fact]) =>
    make("div", make("dt", name.replaceAll("_", " ")), make("dd", fact)));
}

// ---- HTTP; the API key is asked for once ----

let key = sessionStorage.getItem("llmswap-key");

async function request(path, options = {}) {
  for (;;) {
    const sent = key, headers = {...options.headers};
    if (sent) headers.authorization = `Bearer ${utf8(sent)}`;
    const answer = await fetch(path, {...options, headers, cache: "no-store"});
    if (answer.ok) return answer;
    const body = await answer.json().catch(() => null);
    const reason = body?.error?.message || `status ${answer.status}`;
    if (answer.status !== 401) throw new Error(reason);
    if (sent === key) await askForKey();
  }
}

async function askForKey() {
  const dialog = $("key-dialog");
  if (!dialog.open) {
    if (key) fill($, {"key-text": "That key was not accepted."});
    showConnection("needs a key");
    $("key").value = "";
    dialog.showModal();
  }
  await new Promise((close) => dialog.addEventListener("close", close, {once: true}));
  key = $("key").value;
  sessionStorage.setItem("llmswap-key", key);
}

function post(path, value, signal) {
  const headers = {"content-type": "application/json"};
  return request(path, {method: "POST", headers, body: JSON.stringify(value), signal});
}

async function* texts(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    yield value;
  }
}

async function* events(answer) {
  let rest = "";
  for await (const text of texts(answer)) {
    lastByteAt = Date.now();
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

// ---- Snapshots: one stream, while the page is visible ----

const age = () => (Date.now() - snapshotAt) / 1000;
let stream = new AbortController();
let lastByteAt = Date.now();

function showConnection(text) {
  fill($, {connection: text});
  $("connection").className = text;
}

async function followSnapshots() {
  for (;; await new Promise((done) => setTimeout(done, 1000))) {
    if (document.hidden) continue;
    try {
      stream = new AbortController();
      const headers = {accept: "text/event-stream"};
      const answer = await request("/", {headers, signal: stream.signal});
      recentKey = "";
      for await (const data of events(answer)) applySnapshot(JSON.parse(data));
    } catch { /* connect again */ }
    showConnection("reconnecting");
  }
}

function applySnapshot(next) {
  for (const model of next.models) {
    const {id} = model, before = snapshot?.models.find((each) => each.id === id);
    if (model.unusable) model.state = "unusable";
    else if (model.state === "unloaded" && model.failure) model.state = "failed";
    const hasChanged = before && before.state !== model.state;
    if (hasChanged) fill($, {"live-region": `${id} ${model.state}`});
  }
  [snapshot, snapshotAt] = [next, Date.now()];
  showConnection("live");
  paint();
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) stream.abort(); // browsers allow few connections
});
setInterval(() => {
  if (Date.now() - lastByteAt > 30000) stream.abort(); // not even a comment came
  if (snapshot && !document.hidden) paint(), fetchRequests();
}, 1000);

// ---- The page ----

const groups = {unusable: "broken", failed: "broken", unloaded: "rest"};
const groupOf = ({state}) => groups[state] || "held";

function matches(...texts) {
  return join(texts).toLowerCase().includes($("search").value.trim().toLowerCase());
}

function paint() {
  const {models} = snapshot, own = models.filter(({shares}) => !shares);
  const focused = document.activeElement;
  const found = models.filter(({id, aliases, description}) =>
    matches(id, ...aliases, description));
  for (const section of document.querySelectorAll("main section")) {
    const [heading, ul] = section.children;
    const group = found.filter((model) => groupOf(model) === section.className);
    paintRows(ul, "model-row", group, paintModel);
    heading.lastElementChild.textContent = group.length;
  }
  paintRows($("recent"), "request-row", recent.filter((row) =>
    matches(row.model, row.asked, row.user_agent, row.session)), paintRequest);
  for (const [id, row] of rows) if (!row.isConnected) rows.delete(id);
  keepFocus(focused);
  fill($, {
    "no-models": !models.length,
    problem: snapshot.problem,
    search: models.length > 1 || $("search").value !== "",
  });
  paintTotals(own);
  paintBudget(own);
  paintPrompt(models);
}

function keepFocus(focused) { // a row loses it by moving, a button by being hidden
  const isHidden = focused.closest("li") && !focused.checkVisibility();
  const target = isHidden ? focused.closest("li").querySelector("summary") : focused;
  if (target !== document.activeElement) target?.focus({preventScroll: true});
}

function paintTotals(own) {
  const total = (name) => own.reduce((sum, model) => sum + (model[name] || 0), 0);
  const [rss, vram] = [total("rss"), total("vram")];
  const names = own.filter(({state}) => state === "loaded").map(({id}) => id);
  fill($, {totals: join([
    `${names.length} of ${own.length} loaded`,
    requests({running: total("running"), waiting: total("waiting")}),
    rss && `${bytes(rss)} memory`,
    vram && `${bytes(vram)} VRAM`,
  ])});
  document.title = join([...names, "llmswap"]);
}

function paintBudget(own) {
  const bars = Object.entries(snapshot.budget).map(([name, size]) => {
    const held = own.map(({id, holds}) => [id, holds[name] || 0]);
    const free = held.reduce((left, [, amount]) => left - amount, size);
    return [[name, size], ...held, ["free", free]];
  });
  paintList($("budget"), bars, (bar) => make("p", ...bar.map(([text, amount]) => {
    const part = make("span", `${text} ${bytes(amount)}`);
    part.title = part.textContent;
    part.style.flexGrow = amount / bar[0][1];
    part.hidden = amount <= 0;
    return part;
  })));
}

function paintModel(row, model) {
  const {id, state, kind, shares, progress, unload_in: left} = model;
  const isHeld = groupOf(model) === "held", spared = model.context_seconds;
  const failure = model.unusable || (state === "failed" && model.failure) || "";
  const [why, ...lines] = failure.split("\n");
  const needs = Object.entries(model.needs).map(([name, n]) => `${name} ${bytes(n)}`);
  const word = {failed: "Try again", unloaded: "Load", loading: "Cancel"}[state];
  const find = partsOf(row);
  row.className = `model ${state}`;
  fill(find, {
    id,
    aliases: model.aliases.join(", "),
    about: join([
      {remote: "remote", unit: "systemd unit"}[kind],
      shares && `shares ${shares}`,
      model.pinned && "pinned",
      needs.length && `needs ${needs.join(", ")} (${model.needs_source})`,
      model.description,
    ]),
    state: state !== "unloaded" && state,
    detail: detailOf(model),
    why,
    lines: lines.join("\n"),
    progress: state === "loading" && progress !== null,
    buttons: state !== "unusable",
    page: !shares && kind === "llama-server" && state === "loaded",
    log: !shares && kind !== "remote" && (isHeld || model.seconds !== null),
    main: !shares && (word || "Unload"),
  });
  find("progress").value = progress || 0;
  find("page").href = `/upstream/${encodeURIComponent(id.toWellFormed())}/`;
  find("main").dataset.do = isHeld ? "unload" : "load";
  find("main").ariaDisabled = state === "unloading";
  const buttons = find("buttons").children;
  for (const each of buttons) each.ariaLabel = `${each.textContent} ${id}`;
  const context = join([bytes(model.context), spared && `${duration(spared)} spared`]);
  paintFacts(row, isHeld && !shares && {
    "Memory": bytes(model.rss),
    "VRAM": bytes(model.vram),
    "Requests": requests(model) || "none",
    "Last answer": speed(model.tokens_per_second),
    "Saved context": context,
    "Unloads in": left !== null && duration(left - age()),
  });
}

function detailOf(model) {
  const {state, seconds, progress, stopped, context} = model;
  const since = seconds !== null && duration(seconds + age());
  if (groupOf(model) === "held") {
    return join([progress !== null && `${Math.round(progress * 100)} %`, since]);
  }
  if (state === "unloaded" && model.waiting) return requests(model);
  const saved = context && `${bytes(context)} of context saved`;
  return join([state === "unloaded" && stopped, since && `${since} ago`, saved], ", ");
}

// ---- Buttons, and the log, which scrolls on while its end is visible ----

const actions = {
  load: (id) => post("/models/load", {model: id}),
  unload: (id) => post("/models/unload", {model: id}),
  cancel: (id) => post(`/api/requests/${id}/cancel`, {}),
  log: followLog,
  prompt(id) {
    $("model").value = id;
    isChosen = true;
    $("text").focus();
  },
};

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-do]");
  if (!button || button.ariaDisabled === "true") return;
  if (event.detail > 1) return; // the second of a double click on Load would cancel
  try {
    await actions[button.dataset.do](button.closest("li")?.dataset.id || "");
  } catch (error) {
    alert(error.message);
  }
});

async function followLog(id) {
  const reading = new AbortController(), {signal} = reading, lines = $("lines");
  const write = (text) => {
    const isAtEnd = lines.scrollTop + lines.clientHeight > lines.scrollHeight - 24;
    lines.append(text.replace(/\x1b\[[\d;]*m/g, ""));
    while (lines.childNodes.length > 3000) lines.firstChild.remove();
    if (isAtEnd) lines.scrollTop = lines.scrollHeight;
  };
  fill($, {"log-title": `Log of ${id || "llmswap"}`});
  lines.replaceChildren();
  $("log").showModal();
  $("log").onclose = () => reading.abort();
  try {
    const name = encodeURIComponent(id.toWellFormed());
    const answer = await request(`/logs/stream/${name}`, {signal});
    for await (const text of texts(answer)) write(text);
  } catch (error) {
    if (!signal.aborted) write(`(${error.message})\n`);
  }
}

// ---- Requests: fetched when a snapshot says that one of them has changed ----

let recent = []; // those in flight, then those that ended; received at recentAt
let recentAt = 0;
let recentKey = ""; // the state for which they were fetched
let isFetching = false;

async function fetchRequests() {
  const limit = $("search").value.trim() ? 500 : 100;
  const wanted = `${snapshot.requests} ${limit}`;
  if (isFetching || wanted === recentKey) return;
  [isFetching, recentKey] = [true, wanted];
  try {
    const answer = await request(`/api/requests?limit=${limit}`);
    recent = (await answer.json()).requests;
  } catch { /* retried when the stream of snapshots has reconnected */ }
  [isFetching, recentAt] = [false, Date.now()];
  paint();
}

function paintRequest(row, request) {
  const {id, model, status, client, seconds, user_agent: agent} = request;
  const isRunning = status === null, hasFailed = status >= 400 && status !== 499;
  const runs = seconds + (Date.now() - recentAt) / 1000, find = partsOf(row);
  row.className = `request ${isRunning ? "loading" : hasFailed ? "failed" : ""}`;
  const name = agent.startsWith("Mozilla/") ? "browser" : agent.split(/[/ ]/)[0];
  const at = new Date(1000 * request.started);
  fill(find, {
    model: model || request.asked || request.path,
    by: join([name, client !== "127.0.0.1" && client]),
    total: isRunning ? duration(runs) : shortDuration(seconds),
    sum: join([at.toLocaleTimeString(), summaryOf(request)]),
    cancel: isRunning,
  });
  find("cancel").ariaLabel = `Cancel request ${id} of ${model}`;
  paintFacts(row, {
    ...request,
    started: at.toLocaleString(),
    method: "",
    path: `${request.method} ${request.path}`,
    waited: shortDuration(request.waited),
    first_byte: shortDuration(request.first_byte),
    seconds: "", // shown already
    tokens_per_second: speed(request.tokens_per_second),
  });
}

function summaryOf(request) {
  const {tokens_in, tokens_cached, tokens_out, waited, first_byte, stream} = request;
  const {status, error} = request;
  if (status >= 400) return `${status} ${(error || "").split("\n")[0]}`;
  if (status === null && waited === null) return "waiting for the model";
  const cached = tokens_cached ? ` (${count(tokens_cached)} cached)` : "";
  return join([
    tokens_in !== null && `${count(tokens_in)} in${cached}`,
    tokens_out !== null && `${count(tokens_out)} out`,
    speed(request.tokens_per_second),
    waited >= 0.1 && `waited ${shortDuration(waited)}`,
    stream && first_byte !== null && `first byte ${shortDuration(first_byte)}`,
  ], ", ");
}

$("search").addEventListener("input", paint);

// ---- A prompt, and its streaming answer ----

let chatAbort = null; // the AbortController of the request
let isChosen = false; // the user has chosen a model

function paintPrompt(models) {
  const usable = models.filter(({state}) => state !== "unusable");
  const loaded = usable.find(({state}) => state === "loaded");
  const ids = usable.map(({id}) => id), before = $("model").value;
  paintList($("model"), ids, (id) => new Option(id));
  if (ids.includes(before)) $("model").value = before;
  if (loaded && !isChosen && !chatAbort) $("model").value = loaded.id;
  fill($, {prompt: usable.length > 0, send: chatAbort ? "Stop" : "Send"});
  $("send").className = chatAbort ? "" : "main";
  $("answer").ariaBusy = Boolean(chatAbort);
}

async function send() {
  const content = $("text").value.trim(), model = $("model").value;
  if (!content || chatAbort) return;
  chatAbort = new AbortController();
  const stats = `waiting for ${model}`;
  fill($, {answer: true, stats, thought: "", reply: "", error: ""});
  paint();
  const {signal} = chatAbort, messages = [{role: "user", content}];
  const body = {model, messages, stream: true, stream_options: {include_usage: true}};
  try {
    const answer = await post("/v1/chat/completions", body, signal);
    for await (const data of events(answer)) {
      if (data === "[DONE]") break;
      const {error, choices} = JSON.parse(data);
      if (error) throw new Error(error.message || error);
      const delta = choices?.[0]?.delta;
      appendText("thought", delta?.reasoning_content || delta?.reasoning);
      appendText("reply", delta?.content);
    }
    fill($, {stats: $("stats").textContent && "an empty answer"});
  } catch ({message}) {
    fill($, signal.aborted ? {stats: "stopped"} : {stats: "", error: message});
  }
  chatAbort = null;
  paint();
}

function appendText(name, text) {
  if (!text) return;
  fill($, {stats: "", [name]: true});
  $(name).append(text);
}

$("send").addEventListener("click", () => (chatAbort ? chatAbort.abort() : send()));
$("model").addEventListener("change", () => { isChosen = true; });
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});

followSnapshots();
"""

STATUS_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>llmswap</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'
 viewBox='0 0 24 24' fill='none' stroke='%231f5fd6' stroke-width='3'%3E%3Cpath
 d='M3 8h17l-4-4M21 16H4l4 4'/%3E%3C/svg%3E">
<style>{style}</style>
<header>
  <h1>llmswap</h1>
  <p id="totals"></p>
  <input id="search" type="search" placeholder="Search" aria-label="Search" hidden>
  <p id="connection" role="status">connecting</p>
  <button data-do="log" class="plain">Log</button>
</header>
<div class="columns">
  <main>
    <p id="problem" role="alert" hidden></p>
    <div id="budget"></div>
    <section class="held"><h2>In memory <small></small></h2><ul></ul></section>
    <section class="broken"><h2>Needs attention <small></small></h2><ul></ul></section>
    <section class="rest"><h2>Not loaded <small></small></h2><ul></ul></section>
    <p id="no-models" hidden><b>No models yet.</b>
      Each section of the INI file becomes one; SIGHUP reads it again.</p>
  </main>
  <aside>
    <section id="prompt" class="sheet" aria-label="Prompt" hidden>
      <h2>Prompt</h2>
      <textarea id="text" aria-label="Prompt" placeholder="Ask something"></textarea>
      <div class="send">
        <select id="model" aria-label="Model"></select><button id="send"></button>
      </div>
      <p id="stats" hidden></p>
      <div id="answer" aria-live="polite" aria-label="Answer" tabindex="0" hidden>
        <p id="thought"></p><p id="reply"></p><p id="error"></p>
      </div>
    </section>
    <section class="sheet">
      <h2>Requests</h2>
      <ul id="recent"></ul>
    </section>
  </aside>
</div>
<p id="live-region" class="unseen" role="status"></p>
<dialog id="log" aria-labelledby="log-title">
  <form method="dialog">
    <h2><span id="log-title"></span><button class="plain">Close</button></h2>
    <pre id="lines" aria-label="Lines" tabindex="0" autofocus></pre>
  </form>
</dialog>
<dialog id="key-dialog">
  <form method="dialog">
    <h2 id="key-title">API key</h2>
    <p id="key-text">It is kept until this tab is closed.</p>
    <input id="key" type="password" aria-labelledby="key-title"
      autocomplete="current-password" required>
    <button class="main">Continue</button>
  </form>
</dialog>
<template id="model-row">
  <li>
    <span class="dot" aria-hidden="true"></span>
    <div>
      <h3><span data-part="id"></span> <small data-part="aliases"></small></h3>
      <p class="about" data-part="about"></p>
    </div>
    <p class="state"><b data-part="state"></b> <span data-part="detail"></span></p>
    <div class="buttons" data-part="buttons">
      <a class="plain" data-part="page" target="_blank" rel="noreferrer">Web UI</a>
      <button class="plain" data-part="log" data-do="log">Log</button>
      <button class="plain" data-do="prompt">Prompt</button>
      <button data-part="main"></button>
    </div>
    <progress data-part="progress" max="1" aria-label="Progress"></progress>
    <dl></dl>
    <div class="why">
      <p data-part="why"></p>
      <pre data-part="lines" aria-label="Last lines" tabindex="0"></pre>
    </div>
  </li>
</template>
<template id="request-row">
  <li>
    <span class="dot" aria-hidden="true"></span>
    <details>
      <summary>
        <b data-part="model"></b> <span class="by" data-part="by"></span>
        <span data-part="total"></span> <span class="sum" data-part="sum"></span>
      </summary>
      <dl></dl>
    </details>
    <button data-part="cancel" data-do="cancel">Cancel</button>
  </li>
</template>
<script>{script}</script>
</html>
""".format(style=_STYLE, script=_SCRIPT)

_DIGESTS = [hashlib.sha256(text.encode()).digest() for text in (_SCRIPT, _STYLE)]
PAGE_POLICY = (  # the page's own script and style, and requests to its own origin only
    "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
).format(*(base64.b64encode(digest).decode() for digest in _DIGESTS))


# ==================================================================================
# 9  API: what each path means; the only place that catches an APIError of a request.
#    Never knows the Scheduler or subprocesses.
#
#    One Handler serves one connection, request after request, on a thread of its own.
#    An action answers, returns what is to be sent, or raises; `handle_one_request`
#    alone answers errors.
# ==================================================================================

REQUEST_FIELDS = (
    "id started client user_agent session method path asked model stream waited "
    "first_byte seconds status tokens_in tokens_cached tokens_out tokens_per_second "
    "error".split()
)
VIA_NAME = f"llmswap-{os.urandom(8).hex()}"  # ours in Via, by which loops are detected
IDLE_SECONDS = 75.0  # for the next request on a connection; as nginx
LINGER_SECONDS = 2.0  # for a client that still sends to read our answer
TEXT_LIMIT = 500  # characters of a text from a client; the rest is cut
NAME_PARTS = 64  # slash-separated parts of a model's name
NOTICE_EVERY = 5.0  # s between two notices of a load's progress in a waiting chat
_IP_ADDRESS = re.compile(r"[0-9.]*|\[[0-9a-f:.]+\]")  # in Host, which may be empty
_LOOPBACK = re.compile(r"(::ffff:)?127\.|::1\Z")  # addresses
MODEL_PATHS = ("/props", "/slots", "/metrics", "/lora-adapters")  # POSTs are relayed
OPEN_PATHS = ("/", "/health", "/v1/health")  # need no key
IDLE_TIMEOUT_PARAMETERS = ("keep_alive", "ttl")  # Ollama's and LM Studio's
OLLAMA_PATH = re.compile(
    "/api/(tags|chat|generate|show|ps|version|embed|embeddings|pull|push|create|copy"
    "|delete)/?"
)
EVENTS_PATH = re.compile(".*/(completions?|infill|messages|responses)/?")  # if streamed
TEXT_TYPE = ("content-type", "text/plain; charset=utf-8")


class RequestLog:
    """The requests in flight, and the last that ended, as rows of REQUEST_FIELDS. Any
    thread may call."""

    def __init__(self):
        self._lock = threading.Lock()
        self._count = 0  # of requests so far; the number of the last one
        self._running = {}  # by number: (row, response, when it began)
        self._ended = collections.deque(maxlen=500)

    def start(self, row: dict, response: ClientResponse):
        """Number a request in flight, answered by `response`, and add its row."""
        with self._lock:
            self._count = row["id"] = self._count + 1
            self._running[row["id"]] = row, response, time.monotonic()

    def end(self, row: dict):
        """The request of a row that was added has ended."""
        with self._lock:
            del self._running[row["id"]]
            self._ended.append(tuple(row.values()))  # a fifth of a dict's size

    def rows(self) -> List[dict]:
        """Return the rows of the requests in flight with their times so far, then of
        those that ended; both newest first."""
        now = time.monotonic()
        with self._lock:
            rows = [dict(zip(REQUEST_FIELDS, row)) for row in reversed(self._ended)]
            for row, response, began in self._running.values():
                first = response.first_at and response.first_at - began
                rows.insert(0, {**row, "seconds": now - began, "first_byte": first})
            return rows

    def steps(self) -> int:
        """Return a number that grows when a request begins, is granted its model, is
        answered or ends."""
        with self._lock:
            return 4 * self._count - sum(
                1 + (row["waited"] is None) + (response.first_at is None)
                for row, response, _ in self._running.values()
            )

    def cancel(self, number: str) -> bool:
        """End a request as if its client had left, but send the client the reason.
        Return whether it was in flight."""
        with self._lock:
            for row, response, _ in self._running.values():
                if str(row["id"]) == number:
                    response.is_cancelled = True
                    return True
            return False


ROUTES = collections.defaultdict(dict)  # {path: {method: action}}


def route(methods: str, *paths: str):
    """Make a method of Handler the action of these paths. It answers, or returns a text
    or a value to send as JSON. Of a path that ends with a slash it gets the rest."""

    def add(action):
        for path in paths:
            ROUTES[path].update(dict.fromkeys(methods.split(), action))
        return action

    return add


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one client's connection, request after request. It reads the socket by
    `reader`, not by the base class's `rfile`, which is unusable after a timeout."""

    def setup(self):
        self.pool = self.server.pool
        self.reader = SocketReader(self.request)
        self.has_unread_body = False  # the client may still be sending
        address = self.request.getsockname()
        self.is_on_loopback = isinstance(address, tuple) and _LOOPBACK.match(address[0])
        if self.request.family != socket.AF_UNIX:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_socket_timeouts(self.request)

    def handle(self):
        """Serve requests until either side closes the connection."""
        with contextlib.suppress(ClientDisconnected, OSError):
            super().handle()

    def finish(self):
        """Let a client read our answer while it still sends its body."""
        if self.has_unread_body:
            lingering_close(self.request)

    def handle_one_request(self):
        """Serve one request, and set `close_connection` unless another may follow."""
        self.close_connection = True
        if not self._await_request():
            return
        self.began = time.monotonic()
        self.server.application.reload_if_changed()
        self.config = self.pool.config
        self.head = self.body = self.model = self.response = None
        self.row, self.usage = dict.fromkeys(REQUEST_FIELDS), Usage()
        try:
            self.parse_request()
            self._check_access()
            self._route()
        except (APIError, ConfigError, OSError) as error:
            self._answer_error(error)
        except ClientDisconnected:
            if self.response:
                self.response.status = 499  # as nginx calls it
            raise
        finally:
            self._count_request()
        body, self.body = self.body, None
        self.has_unread_body = body is None or not body.is_complete
        self.close_connection = self.has_unread_body or not self.response.is_persistent

    def _await_request(self):
        """Return whether a request begins within IDLE_SECONDS."""
        if self.reader.buffer:
            return True
        if self.reader.is_untouched:  # a new connection does not count as idle
            return await_event(self.request, select.POLLIN, IDLE_SECONDS)
        return self.server.await_next_request(self.request)

    def parse_request(self):
        """Read a head, strictly. Raise ClientDisconnected if none comes."""
        why = f"the head took longer than {HEAD_SECONDS:g} s"
        self.reader.on_timeout = StallMonitor(HEAD_SECONDS, lambda: RequestTimeout(why))
        raw = b""
        with contextlib.suppress(OSError):
            raw = self.reader.head()
        if not raw:
            raise ClientDisconnected
        self.head = Request(raw)
        path = self.head.path.rstrip("/")
        if path in ROUTES:  # with or without a slash
            self.head.target = path + self.head.target[len(self.head.path) :]
            self.head.path = path
        self.response = ClientResponse(self.request, self.head, self._cors_headers())
        self.response.is_for_anthropic = self.head.path.endswith("/v1/messages")
        self.body = Body(self.reader, self.head, self.config.settings.max_body)

    def _count_request(self):
        """Count and list the request if it was for a model or failed."""
        response, row, usage = self.response, self.row, self.usage
        if response is None:
            return
        status = response.status or 500
        if response.problem and status < 400:
            status = response.problem.status
        has_failed = status >= 400 and status != 499  # clients may leave our streams
        if self.model is None and not has_failed:
            return
        if has_failed and self.head and not row["id"]:
            self._list_request()
        seconds = time.monotonic() - self.began
        speed = speed_of(usage, seconds - (row["waited"] or 0))
        names = "tokens_in", "tokens_cached", "tokens_out"
        amounts = {name: getattr(usage, name) for name in names}
        if row["id"]:
            row.update(
                amounts,
                status=status,
                seconds=seconds,
                first_byte=response.first_at and response.first_at - self.began,
                tokens_per_second=speed,
                error=str(response.problem)[:TEXT_LIMIT] if response.problem else None,
            )
            self.server.requests.end(row)
        self.pool.count_request(
            self.model, status, seconds, row["waited"], speed,
            bytes_in=self.body.received if self.body else 0,
            bytes_out=response.sent,
            **amounts,
        )

    def _list_request(self):
        """List the request with what is known of it now."""
        head, body, address = self.head, self.body, self.client_address
        asked = (body and body.model) or head.parameter("model") or ""
        self.row.update(
            started=time.time(),
            client=address[0] if isinstance(address, tuple) else "unix",
            user_agent=head.get("user-agent")[:TEXT_LIMIT],
            session=head.get("x-session-id")[:TEXT_LIMIT],
            method=head.method[:TEXT_LIMIT],
            path=head.path[:TEXT_LIMIT],
            asked=asked[:TEXT_LIMIT] or None,
            model=self.model.name if self.model else None,
            stream=body is not None and body.members.get("stream") is True,
        )
        self.server.requests.start(self.row, self.response)

    # -- answers ---------------------------------------------------------------------

    def _answer_error(self, error):
        if self.head is None:  # often TLS, whose client shows no reason
            self.server.log("warning", f"a request was refused: {error}")
        if not isinstance(error, APIError):  # no OSError of the client's socket
            error = APIError(str(error))
        response = self.response or ClientResponse(self.request, None, [])
        self.response, response.problem = response, error
        if self.body is None or not self.body.is_complete:
            response.is_persistent = False
        if response.status:
            return response.abort(error)
        headers = []
        if error.status == 401:  # Basic makes a browser ask for it, as a password
            is_page = "text/html" in self.head.get("accept")
            scheme = 'Basic realm="API key"' if is_page else "Bearer"
            headers.append(("www-authenticate", scheme))
        if error.status == 405:
            headers.append(("allow", ", ".join([*ROUTES[self.head.path], "OPTIONS"])))
        response.answer_error(error, *headers)

    def _send(self, value):
        """Answer with a text, or a value as JSON; with nothing if it is None."""
        if isinstance(value, str):
            self.response.answer(value.encode(), 200, TEXT_TYPE)
        elif value is not None:
            self.response.answer(to_json(value), 200, JSON_TYPE)

    def _stream(self, get, content_type="text/event-stream", render=as_event):
        """Send items until the client leaves or llmswap ends. `get(timeout)` waits for
        one and returns None after the timeout."""
        self.response.start_stream(content_type)
        self.response.flush()
        while not self.server.is_closing and self.head.method != "HEAD":
            item = get(POLL_INTERVAL)
            if item is None:
                self.response.heartbeat()
            else:
                self.response.send(render(item))
        self.response.end()

    # -- access ----------------------------------------------------------------------

    def _check_access(self):
        """Raise Forbidden or Unauthorized unless Host, Origin and key are accepted."""
        head, keys, origin = self.head, self.config.api_keys, self.head.get("origin")
        host, allowed = head.get("host"), self.config.settings.allowed_hosts
        name = _host_name(host)
        is_listed = "*" in allowed or name in allowed or _IP_ADDRESS.fullmatch(name)
        if self.is_on_loopback and not is_listed:
            raise Forbidden(f"Host {host!r} is not among allowed-hosts in [llmswap]")
        if origin and (head.is_upgrade or not head.is_safe):
            self._check_origin(origin)
        is_open = head.path in OPEN_PATHS and not self._wants_snapshots()
        if not keys or is_open or head.method == "OPTIONS":
            return
        if not any(_is_key(given, keys) for given in self._given_keys()):
            raise Unauthorized("a valid API key is needed (Authorization: Bearer KEY)")

    def _check_origin(self, origin):
        """Raise Forbidden unless pages of this origin may use llmswap."""
        if not self._is_origin_allowed(origin):
            shown = origin or "of a browser"
            text = f"the origin {shown!r} is not in cors-origins in [llmswap]"
            raise Forbidden(text)

    def _is_origin_allowed(self, origin):
        allowed = self.config.settings.cors_origins
        if "*" in allowed or origin.lower() in allowed or self._is_own_origin(origin):
            return True
        name = _host_name(origin.partition("://")[2])
        return "localhost" in allowed and name in ("localhost", "127.0.0.1", "[::1]")

    def _is_own_origin(self, origin):
        name = origin.partition("://")[2]
        return bool(name) and name == self.head.get("host")

    def _is_from_foreign_page(self):
        """Return whether a foreign page made a browser send this, other than by a link:
        the browser adds the key that it has stored."""
        head, origin = self.head, self.head.get("origin")
        site = head.get("sec-fetch-site")  # sent by new browsers, to secure addresses
        if not site:
            return bool(origin) and not self._is_own_origin(origin)
        is_link = head.is_safe and head.get("sec-fetch-mode") == "navigate"
        return site not in ("same-origin", "none") and not is_link

    def _check_no_foreign_page(self):
        """Raise Forbidden if a foreign page causes a GET that changes something."""
        head, site = self.head, self.head.get("sec-fetch-site")
        if site == "same-origin" or not head.is_safe:
            return
        origin = head.get("origin") or "/".join(head.get("referer").split("/")[:3])
        if origin or site or head.get("user-agent").startswith("Mozilla/"):
            self._check_origin(origin)

    def _given_keys(self):
        """Yield the keys in the headers, as bytes."""
        for value in self.head.all("x-api-key"):
            yield value.encode("latin-1")
        for value in self.head.all("authorization"):
            scheme, _, rest = value.partition(" ")
            if scheme.lower() == "bearer":
                yield rest.strip().encode("latin-1")
            elif scheme.lower() != "basic":
                yield value.encode("latin-1")
            elif not self._is_from_foreign_page():
                with contextlib.suppress(ValueError):
                    yield base64.b64decode(rest).partition(b":")[2]

    def _cors_headers(self):
        origin = self.head.get("origin")
        if not origin or not self._is_origin_allowed(origin):
            return []
        return [
            ("access-control-allow-origin", origin),
            ("access-control-allow-credentials", "true"),
            ("access-control-expose-headers", "*"),
            ("vary", "Origin"),
        ]

    # -- routes ----------------------------------------------------------------------

    def _route(self):
        """Answer if the path is one of ours; all others are routed by model."""
        path, method = self.head.path, self.head.method
        prefix = next(filter(path.startswith, PREFIXES), "")
        actions = ROUTES.get(prefix or path, {})
        action = actions.get("GET" if method == "HEAD" else method)
        if method == "OPTIONS":
            action, prefix = Handler.answer_preflight, ""
        elif path in MODEL_PATHS and self.head.parameter("model") is not None:
            action = action and Handler.get_from_model
        if action:
            self.body.hold(SMALL_BODY)  # if it is malformed, nothing may change
            rest = [percent_decoded(path[len(prefix) :].rstrip("/"))] if prefix else []
            return self._send(action(self, *rest))
        if path.startswith("/upstream/"):
            return self.route_upstream(path[len("/upstream/") :])
        if path in ROUTES and path not in MODEL_PATHS:
            raise MethodNotAllowed(f"{method} is not allowed at {path}")
        url = f"http://{self.head.get('host')}/v1"
        if OLLAMA_PATH.fullmatch(path):
            text = f"{path} is Ollama's API; this is an OpenAI-compatible server"
            raise NotFound(f"{text}: use an OpenAI provider with the base URL {url}")
        if path.startswith("/v1/v1/"):
            raise NotFound(f"{path}: the base URL has /v1 twice; set it to {url}")
        self.route_by_model()

    @route("GET POST", "/tools", "/cors-proxy")
    def refuse_feature(self):
        raise FeatureDisabled("this feature is disabled")

    @route("POST", "/v1/streams/lookup")
    def look_up_streams(self):
        return []  # none can be resumed

    def answer_preflight(self):
        names = self.head.get("access-control-request-headers") or "*"
        headers = [
            ("access-control-allow-methods", "GET, POST, PUT, PATCH, DELETE, OPTIONS"),
            ("access-control-allow-headers", names),
            ("access-control-max-age", "600"),
        ]
        self.response.answer(b"", 204, *headers if self.response.extra else ())

    def _wants_snapshots(self):
        """Return whether this is the page's request for a stream of snapshots."""
        is_root = self.head.method == "GET" and self.head.path == "/"
        return is_root and "text/event-stream" in self.head.get("accept")

    @route("GET", "/")
    def get_page(self):
        if self._wants_snapshots():
            snapshots = self._snapshots()
            return self._stream(lambda timeout: next(snapshots))
        self.response.answer(
            STATUS_PAGE.encode(),
            200,
            ("content-type", "text/html; charset=utf-8"),
            ("content-security-policy", PAGE_POLICY),
            ("cache-control", "no-cache"),
        )

    def _snapshots(self):
        """Yield a snapshot at each change, and every 2 s unless all models are
        unloaded; None after each POLL_INTERVAL without one."""
        seen, again_at = None, math.inf
        while True:
            revision = self.pool.await_change(seen, POLL_INTERVAL)
            if revision == seen and time.monotonic() < again_at:
                yield None
                continue
            seen = revision
            statuses = self.pool.statuses(with_memory=True)
            models = [status for status, _ in self._with_details(statuses)]
            is_busy = any(model.state != "unloaded" for model in models)
            again_at = time.monotonic() + 2.0 if is_busy else math.inf
            yield {
                "models": [*map(shown_on_page, models)],
                "requests": self.server.requests.steps(),
                "problem": self.server.application.config_error,
                "budget": self.pool.budget,
            }
            time.sleep(0.25)  # faster is unreadable

    @route("GET", "/metrics")
    def get_metrics(self):
        statuses, pool = self.pool.statuses(with_memory=True), self.pool
        text = metrics_text(statuses, pool.metrics(), pool.budget, self.server.born)
        self.response.answer(text.encode(), 200, METRICS_TYPE)

    def _with_details(self, statuses):
        """Yield each status, if unloaded with the reason why a load would fail, and the
        Details of the model whose backend it uses."""
        self.config = self.pool.config
        details = self.pool.inspector.details_of([*self.config.models.values()])
        for status in statuses:
            if status.id in details:  # else a reload has just removed it
                known = details.get(status.shares, details[status.id])
                if status.state == "unloaded" and not status.failure:
                    status = status._replace(failure=known.problem)
                yield status, known

    @route("GET", "/health", "/v1/health")
    def get_health(self):
        return {"status": "ok", "server": "llmswap", **self.pool.counts()}

    @route("GET", "/v1/models", "/models")
    def get_models(self):
        if self.head.parameter("reload"):
            self._check_no_foreign_page()
            self.server.application.reload()
            self.config = self.pool.config
        listed = [m for m in self.config.models.values() if not m.settings.unlisted]
        return {"object": "list", "data": self._model_entries(listed)}

    @route("GET", "/v1/models/")
    def get_model(self, name):
        for entry in self._model_entries([self._resolve(name)]):
            return entry
        raise ModelNotFound(f"a reload has just removed {name!r}")

    def _model_entries(self, models):
        statuses = [self.pool.status(model) for model in models]
        return [
            model_entry(self.config.models, status, details, self.server.born)
            for status, details in self._with_details(statuses)
        ]

    @route("GET", "/api/requests")
    def get_requests(self):
        name, limit = self.head.parameter("model"), self.head.parameter("limit")
        try:
            count = parse_count(limit) if limit else None
        except ValueError as error:
            raise BadRequest(f"limit: {error}", "limit") from None
        rows = self.server.requests.rows()
        if name is not None:
            names = (name, self.config.find(name))
            rows = [row for row in rows if row["model"] in names]
        return {"requests": rows[:count]}

    @route("POST", "/api/requests/")
    def cancel_request(self, rest):
        """End a request; `rest` is its number and /cancel."""
        number, _, action = rest.partition("/")
        if action != "cancel" or not self.server.requests.cancel(number):
            raise NotFound(f"{self.head.path}: no such request is in flight")
        return {"success": True}

    @route("POST", "/models/load", "/models/unload")
    def change_model(self):
        """Begin to load or unload the model that the body names."""
        self.body.find_model("application/json")
        model = self._resolve(self.body.model)
        is_load = self.head.path == "/models/load"
        change = self.pool.load if is_load else self.pool.unload
        if not change(model):
            raise BadRequest(f"model is {'already' if is_load else 'not'} running")
        return {"success": True}

    def _resolve(self, name):
        if name is None:
            raise BadRequest("model name is missing from the request", "model")
        return self.config.resolve(name[:TEXT_LIMIT])

    @route("GET POST", "/unload")
    @route("POST", "/api/models/unload", "/api/models/unload/")
    def unload(self, name=""):
        """Unload a model, or all of them, and answer when they are unloaded."""
        self._check_no_foreign_page()
        if name:
            self.pool.unload(self._resolve(name))
        else:
            self.pool.unload_all("by hand")
        self.pool.await_unloaded(self.response.heartbeat)
        return "OK"

    @route("GET", "/running")
    def get_running(self):
        words = {"loading": "starting", "loaded": "ready", "unloading": "stopping"}
        running = [
            {
                "model": status.id,
                "state": words.get(status.state, status.state),
                "cmd": shlex.join(shown_command(details, status)),
                "proxy": self.config.models[status.id].url(str(status.port)),
                "ttl": int(self.config.models[status.id].settings.idle_timeout),
                "name": status.id,
                "description": status.description,
            }
            for status, details in self._with_details(self.pool.statuses())
            if status.state != "unloaded" and not status.shares
        ]
        return {"running": running}

    @route("GET", "/props")
    def get_props(self):
        return {
            "role": "router",
            "max_instances": self.config.settings.models_max,
            "models_autoload": self.config.settings.models_autoload,
            "model_alias": "llmswap",
            "model_path": "none",
            "default_generation_settings": {"params": None, "n_ctx": 0},
            "ui_settings": {},
            "build_info": f"llmswap {VERSION}",
            "cors_proxy_enabled": False,
        }

    @route("GET", "/models/sse")
    def get_events(self):
        with self.pool.events.subscribe() as get:
            self._stream(get)

    @route("GET", "/logs")
    def get_logs(self):
        return "".join(f"{line}\n" for line in self.server.log.feed.history())

    @route("GET", "/logs/stream", "/logs/stream/")
    def get_log_stream(self, name=""):
        feed = self.server.log.feed
        if name not in ("", "proxy"):
            status = self.pool.status(self._resolve(name))
            feed = self.pool.output_of(status.shares or status.id)
        with feed.subscribe(self.head.parameter("no-history") is None) as get:
            self._stream(get, TEXT_TYPE[1], lambda line: f"{line}\n".encode())

    # -- requests for models ---------------------------------------------------------

    @route("GET", "/slots", "/lora-adapters")
    def get_from_model(self):
        """Relay a GET; without autoload=true it never loads, wakes or keeps a model."""
        model = self.model = self._resolve(self.head.parameter("model") or None)
        if self.head.parameter("autoload") in ("true", "1"):
            return self._forward(self.head.target)
        states = [State.LOADED]
        if self.head.path in ("/props", "/metrics"):  # do not wake llama-server
            states.append(State.SLEEPING)
        backend = self.pool.backend_of(model, *states)
        if backend is None:
            raise BadRequest("model is not loaded")
        self._edit_body()  # raises LoopDetected
        self._relay(self.head.target, backend)

    def _check_use(self, refusal):
        """Raise a refusal if the model is not loaded, and may not be by this request:
        the given one, or by llama.cpp's rules; else return it. Raise Forbidden if a
        foreign page causes a GET that would load the model."""
        if self.head.is_safe and not self.pool.backend_of(self.model, State.LOADED):
            self._check_no_foreign_page()
        value, not_loaded = self.head.parameter("autoload"), "model is not loaded"
        if value:
            refusal = None if value in ("true", "1") else BadRequest(not_loaded)
        elif not self.config.settings.models_autoload:
            refusal = refusal or BadRequest(not_loaded)
        states = State.LOADING, State.LOADED
        if refusal and not self.pool.backend_of(self.model, *states):
            raise refusal
        return refusal

    def route_upstream(self, rest):
        """Relay to a model's own server; `rest` is its name and the path there. The
        longest known name counts, as names may have slashes."""
        parts = rest.split("/")
        for count in range(min(len(parts), NAME_PARTS), 0, -1):
            name = percent_decoded("/".join(parts[:count]))
            if self.config.find(name):
                break
        model = self.model = self._resolve(name)
        path = "".join(f"/{part}" for part in parts[count:])
        query = self.head.target[len(self.head.path) :]
        if not path:
            location = f"/upstream/{rest}/{query}"
            return self.response.answer(b"", 308, ("location", location))
        text = f"model {model.name!r} is not loaded; only the page itself loads it"
        is_asset = self.head.is_safe and path != "/"
        refusal = ModelNotLoaded(text) if is_asset else None
        self.body.find_model(self.head.get("content-type"), is_needed=False)
        self._forward(path + query, refusal, preemptible=self.head.is_safe)

    def route_by_model(self):
        """Route by the model that the body, the form or the query names."""
        name = self.head.parameter("model")
        self.body.find_model(self.head.get("content-type"), is_needed=not name)
        name = self.body.model or name
        if not name and self.head.is_safe:
            raise NotFound(f"there is nothing at {self.head.path}")
        model = None if name else self.config.default_model()
        self.model = model or self._resolve(name or None)
        self._forward(self.head.target)

    def _forward(self, target, refusal=None, preemptible=False):
        """Relay to the model's backend; once more if that died before it answered."""
        refusal = self._check_use(refusal)
        idle_timeout = _idle_timeout_in(self.body.members)
        preemptible = preemptible or self.head.is_upgrade
        if not preemptible:
            self._list_request()
        notice, path = self.model.settings.loading_notice, target.split("?")[0]
        may_stream = self.head.method == "POST" and EVENTS_PATH.fullmatch(path)
        is_stream = may_stream and self.body.members.get("stream") is True
        self.response.wants_events = is_stream and notice != "off"
        if notice == "reasoning" and path.endswith("/chat/completions"):
            self.response.progress_event = self._progress_events().__next__
        self.body.on_tick = self.response.check_cancelled
        self._edit_body()
        may_repeat = self.body.is_complete and not refusal
        terms = self.model, self.response.heartbeat
        kind = {"preemptible": preemptible, "load_refusal": refusal}
        asked_at = time.monotonic()
        for is_last in (False, True):
            with self.pool.lease(*terms, **kind) as backend:
                self.row["waited"] = time.monotonic() - asked_at
                if idle_timeout is not None:
                    self.pool.keep_alive(backend.model, idle_timeout)
                try:
                    self._relay(target, backend)
                    self.usage = usage_in(self.response.excerpt)
                    return backend.record_answer(self.usage)
                except BackendDied as error:
                    has_died = backend.died(1.0)
                    if has_died and may_repeat and not is_last:
                        continue
                    reason = backend.death(DEATH_TIMEOUT) if has_died else None
                    error = BackendDied(str(reason or error))
                    error.may_retry = False if is_last else None  # it failed twice
                    raise error from None

    def _progress_events(self):
        """Yield events that a chat shows as the model's reasoning during its load, or
        b"" if nothing has changed or the last event is too recent."""
        name, last_text, next_at = self.model.name, "", 0.0
        while True:
            status, now = self.pool.status(self.model), time.monotonic()
            text = f"waiting for room for {name}"
            if status.state == "loading":
                progress = percent(status.progress) or f", {status.seconds:.0f} s"
                text = f"loading {name}{progress}"
            if now < next_at or text == last_text or status.state == "loaded":
                yield b""
                continue
            last_text, next_at = text, now + NOTICE_EVERY
            delta = {"reasoning_content": f"{text}\n"}
            yield as_event({
                "id": f"chatcmpl-{name}-loading",
                "object": "chat.completion.chunk",
                "created": int(time.time()),
                "model": name,
                "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
            })

    def _edit_body(self):
        """Change the body as the model's settings say. Raise LoopDetected if it comes
        from llmswap."""
        body, settings = self.body, self.model.settings
        if VIA_NAME in ", ".join(self.head.all("via")):
            text = f"the request for {self.model.name} has come back to llmswap"
            raise LoopDetected(f"{text}: its `proxy` ({settings.proxy}) leads there")
        removed = {*IDLE_TIMEOUT_PARAMETERS, *settings.strip_params}
        removed &= body.members.keys()
        defaults, overrides = settings.default_params, settings.set_params
        if settings.model_name:
            overrides = {**overrides, "model": settings.model_name}
        if body.is_json and (removed or defaults or overrides):
            try:
                body.held = edited_json(body.members, removed, defaults, overrides)
            except RecursionError:
                raise BadRequest("the body is nested too deep") from None
        elif body.model is not None and settings.model_name:
            start, end = body.span
            body.held[start:end] = settings.model_name.encode()

    def _relay(self, target, backend):
        key = backend.model.settings.proxy_key
        dropped = {"host", "x-conversation-id"}
        if self.config.api_keys or key:
            dropped |= {"authorization", "x-api-key", "api-key"}
        if self.head.method == "POST":  # events and usage are read from the answer
            dropped.add("accept-encoding")
        if not self.body.coding:  # it may be decoded
            dropped.add("content-encoding")
        headers = [*end_to_end(self.head, dropped), ("via", f"1.1 {VIA_NAME}")]
        if key:
            key = key.encode().decode("latin-1")  # sent as UTF-8
            headers.append(("authorization", f"Bearer {key}"))
        if self.head.is_upgrade:
            upgrade = self.head.get("upgrade")
            headers += [("connection", "upgrade"), ("upgrade", upgrade)]
        outgoing = UpstreamRequest(self.head.method, target, headers, self.body)
        relay(outgoing, backend, self.response, self._repair_for)

    def _repair_for(self, answer):
        """Return a RepairStream for an answer that may need repair, else None."""
        is_wanted = self.model.settings.json_repair and answer.status == 200
        is_readable = answer.is_event_stream or "json" in answer.get("content-type")
        is_encoded = answer.get("content-encoding")
        return RepairStream() if is_wanted and is_readable and not is_encoded else None


PREFIXES = [path for path in ROUTES if path.endswith("/") and path != "/"]


def lingering_close(sock: socket.socket):
    """End our side and read for a while before the socket is closed: a reset while the
    client still sends could discard our answer."""
    end = time.monotonic() + LINGER_SECONDS
    with contextlib.suppress(OSError):  # the client left, or is silent
        sock.shutdown(socket.SHUT_WR)
        while time.monotonic() < end and sock.recv(BUFFER_SIZE):
            pass


def percent_decoded(text: str) -> str:
    """Return a part of a target without percent encoding, read as UTF-8."""
    raw = urllib.parse.unquote_to_bytes(text.encode("latin-1"))
    return raw.decode("utf-8", "replace")


def _idle_timeout_in(members):
    """Return the idle timeout in seconds that a request sets, negative for none; None
    if it sets none."""
    names = [name for name in IDLE_TIMEOUT_PARAMETERS if members.get(name) is not None]
    if not names:
        return None
    text = str(members[names[0]])
    try:
        return parse_duration(text.lstrip("-")) * (-1 if text.startswith("-") else 1)
    except ValueError as error:
        raise BadRequest(f"{names[0]}: {error}", names[0]) from None


_HOST = re.compile(r"(\[[^]]*\]|[^:]*)(?::[0-9]*)?")


def _host_name(host):
    """Return the name in a Host header, without its port; "?" if that is malformed."""
    match = _HOST.fullmatch(host)
    return match[1].lower() if match else "?"


def _is_key(given, keys):
    """Compare with every key, each in constant time."""
    raw = [key.encode("utf-8", "surrogateescape") for key in keys]
    return any([hmac.compare_digest(given, key) for key in raw])


def model_entry(
    models: Mapping[str, Model], status: ModelStatus, details: Details, created: int
) -> dict:
    """Return a model as in /v1/models: all fields of llama.cpp's router, and more.
    `details` are those of the model whose backend it uses."""
    model = models[status.id]
    owner = models.get(status.shares, model)
    abilities = {**owner.settings.capabilities, **model.settings.capabilities}
    meta = {**details.meta, **status.entry.get("meta", {})}
    if "context" in abilities:
        meta["n_ctx"] = abilities.pop("context")
    inputs = [*details.inputs, *(INPUTS[each] for each in abilities if each in INPUTS)]
    architecture = {"input_modalities": inputs, "output_modalities": ["text"]}
    architecture = status.entry.get("architecture", architecture)
    is_llama = owner.kind == "llama-server"
    entry = {
        **status.entry,
        "id": model.name,
        "aliases": sorted(model.aliases),
        "tags": sorted(parse_words(details.options.get("--tags", ""))),
        "object": "model",
        "owned_by": "llamacpp" if is_llama else "llmswap",
        "created": created,
        "status": _shown_status(status, details),
        "architecture": architecture,
        "source": model.source,
        "can_remove": model.source == "cache",
        "meta": meta,
        "capabilities": _capabilities(abilities, architecture, details, is_llama),
    }
    more = {
        "context_length": meta.get("n_ctx") or meta.get("n_ctx_train"),
        "needs": status.needs and {**status.needs, "source": status.needs_source},
        "description": status.description,
    }
    return {**entry, **{name: value for name, value in more.items() if value}}


def _shown_status(status, details):
    shown = {
        "value": "loaded" if status.state == "unloading" else status.state,
        "args": shown_command(details, status),
    }
    if details.preset:
        shown["preset"] = _SECRET_LINE.sub(r"\1 = ***", details.preset)
    problem = status.unusable or status.failure
    if problem and status.state == "unloaded":
        code = status.failure.exit_code if status.failure else 1
        shown.update(failed=True, exit_code=code, error=str(problem))
    return shown


def _capabilities(abilities, architecture, details, is_llama_server):
    """Return the known abilities of a model, in the order of CAPABILITIES."""
    names = set(abilities)
    inputs = architecture.get("input_modalities", ())
    names.update(name for name, word in INPUTS.items() if word in inputs)
    if is_llama_server and details.argv:
        options = details.options
        special = {"--embeddings": "embeddings", "--reranking": "rerank"}
        names.update(special[name] for name in special if name in options)
        if not names & {"embeddings", "rerank"} and "--no-jinja" not in options:
            names.add("tools")
    return [name for name in CAPABILITIES if name in names]


def shown_command(details: Details, status: ModelStatus) -> List[str]:
    """Return the argv of a model, with its port if it has one, and without secrets."""
    port = str(status.port or "${PORT}")
    return mask_secrets([word.replace("${PORT}", port) for word in details.argv])


def mask_secrets(argv: Sequence[str]) -> List[str]:
    """Return the command with *** for the values of options and variables whose name
    says key, token or password, also within the words of a command for a shell."""
    text = _SECRET_WORD.sub(r"\1***", "\0".join(argv))
    return _SECRET_WITHIN.sub(r"\1***", text).split("\0") if argv else []


_SECRET = r"[\w.-]*(?:keys?|token|password)(?![a-z])[\w.-]*"
_SECRET_LINE = re.compile(rf"(?im)^({_SECRET}|hft) = .*$")  # of a preset
_SECRET_WORD = re.compile(
    rf"(?i)(?<![^\0])((?:--?{_SECRET}|-hft)\0(?!--)|-{{0,2}}{_SECRET}=)[^\0]*"
)
_SECRET_WITHIN = re.compile(
    rf"(?i)((?<![\w-])(?:--?{_SECRET}(?:=|\s+)|{_SECRET}=))"
    r"""("[^"\0]*"|'[^'\0]*'|[^\s'"\0]+)"""
)


# ==================================================================================
# 10  Command line: arguments, logging, signals, and the order of shutdown.
#     Decides nothing else.
# ==================================================================================

DRAIN_SECONDS = 30.0  # for the requests in flight at shutdown
REFUSAL_SECONDS = 1.0  # for the refusals of requests that came during shutdown
EXTEND_TIMEOUT = "EXTEND_TIMEOUT_USEC=15000000"  # sent to systemd during shutdown
EXTEND_EVERY = 5.0  # s between two of these
GPU_LOOK_EVERY = 60.0  # s between two looks, while a foreign process uses a GPU
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of malloc.h
MAX_DESCRIPTORS = 65536
MAX_CONNECTIONS = 4096


class Log(logging.handlers.QueueListener):
    """Lines for people, on stderr and in `feed`. Any thread may call; no caller waits.

    `log(level, text)`, with debug, info, warning or error as the level. Lines begin
    with a priority if stderr is systemd's journal, else with the time.
    """

    PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3}

    def __init__(self):
        super().__init__(queue.SimpleQueue())
        self.feed = Broadcast(2000)
        stderr = os.fstat(2)
        stream = f"{stderr.st_dev}:{stderr.st_ino}"
        self._is_journal = os.environ.get("JOURNAL_STREAM") == stream
        self._handler = logging.handlers.QueueHandler(self.queue)
        self._logger = logging.Logger("llmswap")
        self._logger.addHandler(self._handler)
        self.set_level("info")
        self.start()

    def set_level(self, level: str):
        """Drop what is less important than `level`."""
        self._handler.setLevel(level.upper())

    def __call__(self, level: str, text: str):
        self._logger.log(getattr(logging, level.upper()), text)

    def handle(self, record: logging.LogRecord):
        """Write a record, on a thread of its own. Its further lines are indented, so
        that none looks like another record."""
        text = printable(record.getMessage()).replace("\n", "\n  ")
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock} {text}"
        self.feed.publish(line)
        if self._is_journal:
            priority = f"<{self.PRIORITIES[record.levelname]}>"
            line = priority + text.replace("\n", f"\n{priority}")
        with contextlib.suppress(OSError):  # stderr may be closed
            print(line, file=sys.stderr, flush=True)

    def close(self):
        """Write what is left; give up after a second, as stderr may be stuck."""
        start_thread(self.stop, "log").join(1.0)


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections on all sockets; a Handler serves each on its own thread. Any
    thread may call."""

    def __init__(self, sockets: List[socket.socket], pool: Pool, log: Log, application):
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.server_close()  # the socket that the base class has made
        self.pool, self.log, self.application = pool, log, application
        self.requests = RequestLog()
        self.born = int(time.time())
        self.is_closing = False
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_connections = min(MAX_CONNECTIONS, limit // 2)
        self._connections = {}  # those open; whether they wait for a next request
        self._active_at = time.monotonic()
        self._accepting = threading.Lock()
        self._sockets = sockets
        for sock in sockets:
            sock.setblocking(False)

    def start(self):
        """Accept connections, on a thread of its own."""
        self._stop_reader, self._stop_writer = socket.socketpair()
        self._thread = start_thread(self.serve_forever, "accept")

    def serve_forever(self, poll_interval=None):
        """Accept until `stop`; the base class would wake up twice a second."""
        waiter = select.poll()  # select() has no descriptors beyond 1023
        for each in (self._stop_reader, *self._sockets):
            waiter.register(each, select.POLLIN)
        while not self.is_closing:
            ready = {fd for fd, _ in waiter.poll()}
            for self.socket in self._sockets:
                with self._accepting:
                    if self.socket.fileno() in ready and not self.is_closing:
                        self._handle_request_noblock()  # accepts on self.socket

    def is_alive(self) -> bool:
        """Return whether connections are accepted, or are not to be accepted."""
        return self.is_closing or self._thread.is_alive()

    def get_request(self):
        """Accept one connection; OSError if there is none, or no descriptor for it."""
        try:
            return self.socket.accept()
        except OSError as error:
            if not isinstance(error, BlockingIOError):  # the client has left
                self.log("error", f"a connection could not be accepted: {error}")
                time.sleep(1.0)  # until other connections have ended
            raise

    def verify_request(self, request, client_address):
        """Return whether the connection is to be served; else refuse it."""
        if len(self._connections) < self._max_connections:
            self._connections[request] = False
            return True
        reason = f"{self._max_connections} connections are open already"
        refuse_connection(request, reason)
        return False

    def shutdown_request(self, request):
        """Close a connection that was served or refused."""
        super().shutdown_request(request)
        self._connections.pop(request, None)

    def handle_error(self, request, client_address):
        """Log the traceback of a bug. The caller closes the connection."""
        self.log("error", f"bug in llmswap:\n{traceback.format_exc()}")

    def await_next_request(self, connection: socket.socket) -> bool:
        """Return whether a request begins within IDLE_SECONDS; `stop` ends the wait."""
        self._connections[connection] = True
        self._active_at = time.monotonic()
        is_open = not self.is_closing
        has_begun = is_open and await_event(connection, select.POLLIN, IDLE_SECONDS)
        self._connections[connection] = False
        return has_begun

    def inactive_since(self) -> Optional[float]:
        """Return when a connection last became idle; None while any is busy."""
        is_busy = False in list(self._connections.values())
        return None if is_busy else self._active_at

    def try_idle_exit(self) -> bool:
        """Accept no more and return True, unless a connection is busy or waits to be
        accepted. Later ones wait in the backlog of the sockets, which systemd keeps."""
        with self._accepting:
            pending = any(await_event(each, select.POLLIN, 0) for each in self._sockets)
            self.is_closing = self.inactive_since() is not None and not pending
        return self.is_closing

    def stop(self):
        """Stop accepting, and end the connections that wait for a next request."""
        self.is_closing = True
        self._stop_writer.close()
        self._thread.join(1.0)
        for sock in self._sockets:
            sock.close()  # it is never shut down: systemd may own it
        for connection in list(self._connections):
            if self._connections.get(connection):  # it is idle
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)


def refuse_connection(connection: socket.socket, reason: str):
    """Answer 503 on a connection of which nothing was read."""
    connection.settimeout(1)
    problem = APIError(reason, retry_after=5)
    problem.status = 503
    with contextlib.suppress(ClientDisconnected):
        ClientResponse(connection, None, []).answer_error(problem)


# -- listening -------------------------------------------------------------------------

Address = Union[Tuple[str, int], str]  # of an INET socket, or the path of a Unix one


def open_listeners(addresses: Iterable[Address]) -> List[socket.socket]:
    """Return listening sockets. Raise OSError if an address cannot be used; exit with
    status 0 if llmswap answers there already."""
    listeners = []
    for address in addresses:
        try:
            listeners.append(open_listener(address))
        except OSError as error:
            shown = shown_address(address)
            if error.errno == errno.EADDRINUSE and is_llmswap(address):
                print(f"llmswap answers at {shown} already", file=sys.stderr)
                sys.exit(0)
            # without "(while attempting to bind on address ...)"
            reason = str(error.strerror or error).partition(" (while ")[0]
            raise OSError(f"cannot listen on {shown}: {reason}") from None
    return listeners


def open_listener(address: Address) -> socket.socket:
    """Return a listening socket; OSError if the address is taken."""
    if not isinstance(address, str):
        return socket.create_server(address, family=_family(address), backlog=1024)
    with socket.socket(socket.AF_UNIX) as probe:
        is_refused = probe.connect_ex(address) == errno.ECONNREFUSED  # or is no socket
    if is_refused and S_ISSOCK(os.stat(address).st_mode):
        os.unlink(address)  # left by a process that has ended
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o117)
    try:
        listener.bind(address)
    finally:
        os.umask(mask)
    listener.listen(1024)
    return listener


def _family(address):
    if isinstance(address, str):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def is_llmswap(address: Address) -> bool:
    """Return whether llmswap answers there."""
    with contextlib.suppress(OSError), socket.socket(_family(address)) as probe:
        probe.settimeout(2)
        probe.connect(address)  # 0.0.0.0 connects to this machine, too
        probe.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return b"server: llmswap" in probe.recv(65536)
    return False


def shown_address(address: Address) -> str:
    """Return the address as a link that can be clicked or copied."""
    if not isinstance(address, tuple):
        return f"unix:{os.fsdecode(address)}"
    return f"http://{_joined(*address[:2])}/"


def _joined(host, port):
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# -- systemd ---------------------------------------------------------------------------


def passed_listeners(environ: Mapping[str, str]) -> List[socket.socket]:
    """Return the listening sockets that systemd passed to this process. If it passed
    them to another one, such as a shell around this, say so."""
    count = int(environ.get("LISTEN_FDS") or 0)
    if count and environ.get("LISTEN_PID") != str(os.getpid()):
        text = "systemd passed its sockets to another process: start llmswap "
        print(f"{text}without a shell around it, or with exec", file=sys.stderr)
        return []
    return [socket.socket(fileno=fd) for fd in range(3, 3 + count)]


def refuse_pending_connections():
    """Answer 503 to the connections that wait in systemd's sockets; otherwise it would
    start llmswap for them again and again."""
    reason = "llmswap cannot start: its file is broken, its log says where"
    for listener in passed_listeners(os.environ):
        while await_event(listener, select.POLLIN, 0):
            connection = listener.accept()[0]
            refuse_connection(connection, reason)
            lingering_close(connection)
            connection.close()


class SystemdNotifier:
    """Reports llmswap's state to systemd, if that asks for it. Any thread may call."""

    def __init__(self, environ: Mapping[str, str]):
        self._address = re.sub("^@", "\0", environ.get("NOTIFY_SOCKET", ""))
        self._interval = int(environ.get("WATCHDOG_USEC", 0)) / 2e6 or None

    def notify(self, *lines: str):
        """Send the lines in one datagram; drop it if systemd takes none for 1 s."""
        kind = socket.AF_UNIX, socket.SOCK_DGRAM
        with contextlib.suppress(OSError), socket.socket(*kind) as sender:
            sender.settimeout(1.0)
            sender.connect(self._address)
            sender.sendall("\n".join(lines).encode())

    def watch(self, server: Server):
        """Report what is loaded, at each change and twice per WATCHDOG_USEC, as long as
        server and Pool are alive. Return only if systemd asked for none."""
        with server.pool.events.subscribe() as get:
            while self._address:
                if server.is_alive() and server.pool.is_alive(self._interval or -1):
                    held = [
                        f"{status.id} {status.state}{percent(status.progress)[1:]}"
                        for status in server.pool.statuses()
                        if status.state != "unloaded" and not status.shares
                    ]
                    text = ", ".join(held) or "nothing is loaded"
                    self.notify("WATCHDOG=1", f"STATUS={text}")
                get(self._interval)


UNITS = """\
# ~/.config/systemd/user/llmswap.socket
[Unit]
Description=Address of llmswap

[Socket]
ListenStream={streams}
SocketMode=0660
BindIPv6Only=ipv6-only

[Install]
WantedBy=sockets.target

# ~/.config/systemd/user/llmswap.service
[Unit]
Description=One address for many local language models
Requires=llmswap.socket
StartLimitIntervalSec=30
StartLimitBurst=30

[Service]
Type=notify
WorkingDirectory={folder}
Environment={path}
ExecStart={command}
ExecReload=/bin/kill -HUP $MAINPID
KillMode=mixed
OOMPolicy=continue
Restart=on-failure
RestartPreventExitStatus=2
TimeoutStopSec=60
WatchdogSec=60

[Install]
WantedBy=default.target
"""


def units_for(config: Config) -> str:
    """Return a socket and a service unit for the user's systemd that run this file."""
    streams = []
    for address in config.settings.listen:
        if isinstance(address, str):
            streams.append(os.path.abspath(address).replace("%", "%%"))
        else:  # numeric, as systemd does not look up names
            found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
            streams.append(_joined(*found[4][:2]))
    words = [sys.executable, "-m", "llmswap", os.path.abspath(config.path)]
    return UNITS.format(
        streams="\nListenStream=".join(streams),
        folder=os.path.dirname(os.path.abspath(__file__)).replace("%", "%%"),
        path=_unit_word(f"PATH={os.environ.get('PATH', os.defpath)}"),
        command=" ".join(_unit_word(word).replace("$", "$$") for word in words),
    )


def _unit_word(word):
    word = word.replace("%", "%%")
    needs_quotes = re.search(r"[\s\"'\\;]", word)
    return json.dumps(word, ensure_ascii=False) if needs_quotes else word


# -- the demo model server -------------------------------------------------------------


class Parrot(http.server.BaseHTTPRequestHandler):
    """A model server that repeats the last message, for a first try of llmswap."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        """Answer health checks and the list of models."""
        self._send([b'{"status":"ok","object":"list","data":[{"id":"parrot"}]}'])

    def do_POST(self):
        """Answer a chat; what the last message says comes back."""
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        model, messages = request.get("model"), request.get("messages") or [{}]
        text = f"{model} says: {messages[-1].get('content') or 'squawk'}"
        words = re.findall(r"\S+\s*", text)
        if request.get("stream"):
            return self._send(self._events(words), "text/event-stream")
        message = {"role": "assistant", "content": text}
        self._send([to_json({
            "object": "chat.completion",
            "model": model,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": len(words), "completion_tokens": len(words)},
        })])

    def _events(self, words):
        for word in words:
            choice = {"index": 0, "delta": {"content": word}}
            yield as_event({"object": "chat.completion.chunk", "choices": [choice]})
            time.sleep(0.05)
        yield b"data: [DONE]\n\n"

    def _send(self, pieces, content_type="application/json"):
        self.send_response(200)
        self.send_header("content-type", content_type)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for piece in itertools.chain(pieces, [b""]):
            self.wfile.write(as_chunk(piece))

    def log_message(self, format, *args):
        """Log nothing, as llmswap would show it as the model's output."""


# -- arguments -------------------------------------------------------------------------


def parse_args(argv: Optional[List[str]]):
    """Return the arguments; exit with status 2 and a usage if they make no sense."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="llmswap.py", description="One address for many local language models."
    )
    add, flag = parser.add_argument, {"action": "store_true"}
    add("file", nargs="?", metavar="FILE.ini")
    add("--version", action="version", version=f"llmswap {VERSION}")
    add("--listen", metavar="ADDRESS", help="instead of the file's")
    add("--models-max", metavar="N", help="instead of the file's")
    add("--check", help="show each model's command, or its error", **flag)
    add("--units", help="print systemd user units for this file", **flag)
    add("--keys", help="print every key, its default and meaning", **flag)
    add("--verbose", help="log what models write", action="store_const", const="debug")
    add("--parrot", help="be the demo model server (with --port)", **flag)
    add("--port", type=int, default=8090, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.units and not args.file:
        parser.error("--units needs the INI file")
    return args


def print_keys():
    """Print every key with its default and its meaning."""
    indented = textwrap.TextWrapper(88, "      ", "      ", break_on_hyphens=False)
    for title, keys in (("[llmswap]", PROXY_KEYS), ("a model, or [*]", MODEL_KEYS)):
        print(f"Keys of {title}:\n")
        for key in keys:
            print(f"  {key.name} = {key.default}".rstrip())
            print(indented.fill(key.help.replace("`", "")))
        print()


def start_problem(model: Model) -> Optional[str]:
    """Return why the model could not be started now, such as a missing file; else
    None, also for a model whose section is wrong."""
    if not model.problem:
        try:
            check_start(model)
        except LoadFailed as problem:
            return str(problem)


def check(config: Config) -> int:
    """Print each model with its command or its error; return the exit status."""
    models, unusable = config.models.values(), []
    log = lambda level, text: print(printable(text))  # noqa: E731
    needs, budget = Needs(config.settings.state_dir, log), config.settings.budget
    if None in budget.values():
        budget = with_machine_budget(budget, machine_budget())
        print(f"budget {resources_text(budget)}", end="\n\n")
    for model in models:
        aliases = f" ({', '.join(model.aliases)})" if model.aliases else ""
        lines = [f"{model.name}{aliases}: {model.kind}".replace("\n", "\\n")]
        try:
            lines.append(_command_line(model))
            missing = start_problem(model)
            lines += [f"cannot start now: {missing}"] if missing else []
            if model.has_auto_needs:
                needs.estimate(model, budget)
                amounts, source = needs.of(model, budget)
                lines.append(f"needs {resources_text(amounts)} ({source})")
        except ConfigError as error:
            lines.append(f"error: {error}")
            unusable.append(model.name)
        print(printable("\n".join(lines).replace("\n", "\n  ")), end="\n\n")
    unknown = [each for each in models if table_of(each) is UNKNOWN_OPTIONS]
    for binary in sorted({each.settings.llama_server for each in unknown}):
        print(f"the options of {binary} are unknown: they are passed on unchecked")
    for warning in [*config.warnings, *config.pitfalls(table_of)]:
        print(printable(warning))
    count = f"{len(unusable)} of {len(models)} models cannot be used"
    text = f"{count}: {', '.join(unusable)}" if unusable else "no errors"
    print(printable(text))
    return 2 if unusable else 0


PORT_MARK = "\0"  # stands for the port; shlex quotes words with it


def _command_line(model):
    """Return the model's command for a shell that sets PORT, else where it runs."""
    if model.problem:
        raise ConfigError(model.problem)
    if model.kind == "uses":
        return f"the backend of {' or '.join(model.backends)}"
    argv = model.command(table_of(model), PORT_MARK)
    if not argv:
        unit = f"{model.settings.unit} at " if model.kind == "unit" else ""
        return unit + model.url("")
    variables = model.environment(PORT_MARK).items()
    words = [f"{name}={value}" for name, value in variables]
    words = ["env", *words, *argv] if words else argv
    line = shlex.join(words).replace(f"'{PORT_MARK}'", "${PORT}")
    line = line.replace(PORT_MARK, "'${PORT}'")
    cwd = model.settings.cwd
    return f"cd {shlex.quote(cwd)} && {line}" if cwd else line


# -- starting and ending ---------------------------------------------------------------


def prepare_process():
    """Open descriptors 0 to 2 if they are closed, allow for more of them, and have
    malloc return memory to the system: from a single arena, as each keeps the most that
    it ever held, and at once from blocks beyond a threshold, which does not grow."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):  # macOS allows less than it says
        limits = min(hard, MAX_DESCRIPTORS), hard
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with contextlib.suppress(AttributeError, OSError):  # not every C library has it
        import ctypes

        libc = ctypes.CDLL(None)
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)


def main(argv: Optional[List[str]] = None) -> int:
    """Run llmswap until a signal ends it; return the exit status."""
    prepare_process()
    args = parse_args(argv)
    if args.parrot:
        address = ("127.0.0.1", args.port)
        http.server.ThreadingHTTPServer(address, Parrot).serve_forever()
    if args.keys:
        print_keys()
        return 0
    load = functools.partial(load_config, args.file, args.listen, args.models_max)
    file_watch = FileWatch(args.file or os.devnull)
    try:
        config = load(list_cached=cached_models)
        if not (args.file or config.models):
            raise ConfigError(NO_MODELS)
    except ConfigError as error:
        print(printable(str(error)), file=sys.stderr)
        refuse_pending_connections()
        return 2
    if args.check:
        return check(config)
    if args.units:
        print(units_for(config), end="")
    else:
        Application(args, load, file_watch).run(config)
    return 0


NO_MODELS = """\
There is no INI file, and llama-server --cache-list shows no downloaded model.
Download one:     llama-server -hf ggml-org/gemma-3-1b-it-GGUF
Or write a file:  llmswap.py models.ini   (example.ini shows how)"""

WATCH_EVERY = 1.0  # s between two looks at the file
WATCH_SETTLES = 0.1  # s without a change, after which it counts as written
WATCH_TIMEOUT = 0.5  # s that a request waits for a look and a reload


class FileWatch:
    """Notices that a file has changed, when `check` is called. Any thread may call.

    Each look has a thread of its own, because the file may lie on a slow mount. A
    missing or empty file counts as unchanged, because it is about to be written.
    """

    def __init__(self, path: str):
        self._path = path
        self._lock = threading.Lock()
        self._looked_at = -math.inf
        self._look = threading.Thread()  # the last one
        self.mark()

    def mark(self):
        """Count the file as it is now as unchanged."""
        self._seen = self._stamp()

    def check(self, on_change: Callable):
        """Look at the file unless that was done within WATCH_EVERY; if it changed, call
        on_change() on another thread. Wait for these, but WATCH_TIMEOUT at most."""
        now = time.monotonic()
        with self._lock, contextlib.suppress(RuntimeError):  # no more threads can start
            if now >= self._looked_at + WATCH_EVERY and not self._look.is_alive():
                self._looked_at = now
                self._look = start_thread(self._find_change, "watch", on_change)
        if self._look.is_alive():
            self._look.join(max(0.0, self._looked_at + WATCH_TIMEOUT - now))

    def _find_change(self, on_change):
        stamp = self._stamp()
        while stamp not in (None, self._seen):
            time.sleep(WATCH_SETTLES)
            last, stamp = stamp, self._stamp()
            if stamp == last:
                return on_change()

    def _stamp(self):
        with contextlib.suppress(OSError):
            status = os.stat(self._path)
            if status.st_size:
                return status.st_mtime_ns, status.st_size, status.st_ino


def seconds_left(limit: float, *since: Optional[float]) -> float:
    """Return the seconds until `limit`, if it is not 0, has passed since all of these
    times. None stands for now, as something goes on."""
    now = time.monotonic()
    times = [now if each is None else each for each in since]
    return max(0.0, max(times) + (limit or math.inf) - now)


class Application:
    """One run of llmswap: from the listening sockets to the last backend's end."""

    def __init__(self, args, load: Callable, file_watch: FileWatch):
        self._args = args
        self._load = load  # returns the Config of the file as it is now
        self._file_watch = file_watch
        self._signals, self._wakeup = os.pipe()  # numbers of signals; 0: of a reload
        self._reload_lock = threading.Lock()
        self._is_reload_asked = threading.Event()
        self._is_reloaded = threading.Event()
        self._notifier = SystemdNotifier(os.environ)
        self.config_error = None  # why the changed file is not in use

    def run(self, config: Config):
        """Serve until a signal or idleness ends it, unless llmswap runs already."""
        os.set_blocking(self._wakeup, False)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it hides exit statuses
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        listeners = passed_listeners(os.environ)
        self._is_activated = bool(listeners)
        listeners = listeners or open_listeners(config.settings.listen)
        self.log = Log()
        self.log.set_level(self._args.verbose or config.settings.log_level)
        self.pool = Pool(config, self.log)
        self.server = Server(listeners, self.pool, self.log, self)
        addresses = [shown_address(each.getsockname()) for each in listeners]
        self.log("info", f"llmswap {VERSION} at {' and '.join(addresses)}")
        start_thread(self._log_models, "models", config)
        self.pool.start()
        self.server.start()
        start_thread(self._idle_command_loop, "idle")
        self._notifier.notify("READY=1")
        start_thread(self._notifier.watch, "systemd", self.server)
        start_thread(self._reload_loop, "reload")
        if not config.cached:  # it may not have answered in time
            start_thread(self._refresh_cached_models, "cache")
        self._shut_down(self._await_end())

    def _log_models(self, config):
        """Log the models, and what may go wrong with them. It may take long, as it asks
        llama-server for its options and looks for files."""
        self.log("info", f"models: {', '.join(config.models) or 'none'}")
        models = config.models.values()
        for warning in config.warnings:
            self.log("warning", warning)
        for model in models:
            if model.problem:
                self.log("warning", f"{model.name} cannot be used: {model.problem}")
        for warning in config.pitfalls(table_of):
            self.log("warning", warning)
        reasons = collections.defaultdict(list)
        for model in models:
            missing = start_problem(model)
            if missing:  # it may be on a mount that comes later
                reasons[missing].append(model.name)
        for reason, names in reasons.items():
            names = ", ".join(names)
            self.log("warning", f"{names} could not be started now: {reason}")

    def _next_signal(self, timeout):
        """Return the next signal's number, 0 after a reload, None after the timeout."""
        if await_event(self._signals, select.POLLIN, min(timeout, MAX_WAIT)):
            return os.read(self._signals, 1)[0]
        return None

    def _await_end(self):
        """Have SIGHUP reload; return why llmswap is to end."""
        while True:
            limit = self._is_activated and self.pool.config.settings.exit_idle_time
            since = self.pool.inactive_since(), self.server.inactive_since()
            pause = seconds_left(limit, *since)
            if pause == 0 and self.server.try_idle_exit():
                return "idle for long; the next connection starts it again"
            number = self._next_signal(pause)
            if number == signal.SIGHUP:
                self._is_reload_asked.set()
            elif number:
                return f"ending; requests in flight have {DRAIN_SECONDS:g} s"

    def _shut_down(self, reason):
        """End the requests in flight and all backends; a second signal kills them."""
        self.log("info", reason)
        self._notifier.notify("STOPPING=1", EXTEND_TIMEOUT)
        self.server.stop()
        start_thread(self._watch_shutdown, "signals")
        self.pool.close(DRAIN_SECONDS)
        deadline = time.monotonic() + REFUSAL_SECONDS
        while self.server.inactive_since() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        self.log("info", "ended")
        self.log.close()

    def _watch_shutdown(self):
        while True:
            if self._next_signal(EXTEND_EVERY) in (signal.SIGTERM, signal.SIGINT):
                self.pool.kill()
            self._notifier.notify(EXTEND_TIMEOUT)

    # -- reloads ---------------------------------------------------------------------

    def reload(self, cached: Optional[Sequence[str]] = None):
        """Read the file again and use it; `cached`: new names of llama.cpp's cache.
        Raise an APIError with the reason if it is broken; then nothing changes."""
        with self._reload_lock:
            before = self.pool.config
            names = before.cached if cached is None else cached
            self._file_watch.mark()
            try:
                config = self._load(list_cached=lambda _: names)
            except ConfigError as error:
                self.config_error = f"not reloaded: {error}"
                raise APIError(self.config_error) from None
            self.config_error = None
            if config.settings.listen != before.settings.listen:
                self.log("warning", "a change of `listen` needs a restart")
            self.log.set_level(self._args.verbose or config.settings.log_level)
            self.pool.reload(config)
            self.log("info", f"{self._args.file or 'the cache'} was read again")
            start_thread(self._log_models, "models", config)
            start_thread(self._refresh_cached_models, "cache")
            self._is_reloaded.set()
            os.write(self._wakeup, b"\0")

    def reload_if_changed(self):
        """Reload if the file has changed; see FileWatch.check."""
        if self.pool.config.settings.watch:
            self._file_watch.check(self._try_reload)

    def _reload_loop(self):
        """Reload when asked to by signals, of which the next must not wait for that."""
        while self._is_reload_asked.wait():
            self._is_reload_asked.clear()
            self._try_reload()

    def _refresh_cached_models(self):
        """List the models in llama.cpp's cache, and reload if they have changed."""
        config = self.pool.config
        if config.settings.cache_models:
            cached = cached_models(config.settings.llama_server)
            if not cached:
                command = f"{config.settings.llama_server} --cache-list"
                self.log("warning", f"cache-models: {command} shows no model")
            if cached is not None and cached != [*config.cached]:
                self._try_reload(cached)

    def _try_reload(self, cached=None):
        try:
            self.reload(cached)
        except (APIError, RuntimeError) as problem:  # no more threads can be started
            self.log("error", str(problem))

    # -- the idle command ------------------------------------------------------------

    def _idle_command_loop(self):
        ran_at, occupant = -math.inf, None
        while not self.server.is_closing:
            settings, idle_since = self.pool.config.settings, self.pool.idle_since()
            limit = settings.idle_command and settings.idle_command_after
            pause = seconds_left(limit, idle_since, ran_at)
            if pause == 0:
                self.pool.unload_all("because nothing happens")
                self.pool.await_unloaded(lambda: not self._is_idle_since(idle_since))
                before, occupant = occupant, gpu_occupant()
                if not self._is_idle_since(idle_since):
                    occupant = None  # it may be a model of ours that loads now
                elif occupant:
                    pause = GPU_LOOK_EVERY
                    if not before:
                        text = f"idle, but the idle-command waits: {occupant}"
                        self.log("info", text)
                else:
                    self._run_idle_command(settings.idle_command)
                    ran_at = time.monotonic()
            self._is_reloaded.wait(min(pause, MAX_DURATION))
            self._is_reloaded.clear()

    def _is_idle_since(self, since):
        return self.pool.idle_since() == since and not self.server.is_closing

    def _run_idle_command(self, text):
        command = with_environment(split_words(text))
        self.log("info", f"idle: running {shlex.join(command)}")
        options = {"stdin": subprocess.DEVNULL, "env": clean_environment({})}
        try:
            status = subprocess.call(command, **options)
        except OSError as error:
            return self.log("error", f"idle-command: {error}")
        level = "error" if status else "info"
        self.log(level, f"idle-command ended with status {status}")


if __name__ == "__main__":
    try:
        exit_status = main()
        print(end="", flush=True)
    except KeyboardInterrupt:
        exit_status = 130
    except OSError as error:  # of an address, or of standard output
        exit_status = 1
        if error.errno != errno.EPIPE:
            print(f"llmswap: {error}", file=sys.stderr)
    os._exit(exit_status)  # a normal end would wait for a thread stuck in writing a log
