"""Chat templates: found, rendered as the field does, kept in their sandbox and to their limits."""

import json
import os
import pathlib
import subprocess
import sys

import jinja2
import pytest
from chat_tokenizers import MARKUP, SPECIAL, small
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.errors import MimoError
from mimo_jax.text import template
from mimo_jax.text.chat import ChatFormat
from mimo_jax.text.template import ChatTemplate, Renderer

CONTROLS = [*SPECIAL.values(), *MARKUP.values()]
USER = [{"role": "user", "content": "Hello"}]

# The family's format once more, in the templates' language; tools are left to the other file.
MIMO = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\n' ~ default ~ '<|im_end|>' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages if m.role == 'user' %}
    {%- set ns.last = messages.index(m) %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{ '<|im_start|>tool\\n' }}{% endif %}
        {{- '<tool_response>\\n' ~ m.content ~ '\\n</tool_response>\\n' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>' }}{% endif %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- set kept = keep_all_reasoning or loop.index0 > ns.last %}
        {{- '<think>' ~ (m.reasoning_content if kept) ~ '</think>' }}
    {%- endif %}
    {{- m.content }}
    {%- for call in m.tool_calls or [] %}
        {{- '<tool_call>\\n<function=' ~ call.function.name ~ '>\\n' }}
        {%- for key, value in call.function.arguments|items %}
            {%- set value = value if value is string else value|tojson %}
            {{- '<parameter=' ~ key ~ '>' ~ value ~ '</parameter>\\n' }}
        {%- endfor %}
        {{- '</function>\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' ~ ('' if enable_thinking else '<think></think>') }}
{%- endif %}
"""


@pytest.fixture(scope="module")
def renderer():
    renderer = Renderer()
    yield renderer
    renderer.close()


TOKENIZER = small()
OTHER = ChatFormat(TOKENIZER, ChatTemplate({"default": MIMO}, {"default": "D"}))
OURS = ChatFormat(TOKENIZER)
TEXT = st.lists(
    st.one_of(st.sampled_from(CONTROLS), st.text("ab<|\n é\\\"'{%", max_size=4)), max_size=4
)
TEXT = TEXT.map("".join)
CALL = st.builds(
    lambda name, arguments: {"function": {"name": name, "arguments": arguments}},
    st.text("fg<", min_size=1, max_size=3),
    st.dictionaries(
        st.text("kl", max_size=2), st.one_of(TEXT, st.lists(st.integers())), max_size=2
    ),
)
# Markup stays whole in an assistant's content, where templates look for it: not in this comparison.
PLAIN = st.text("ab<|\n é\\\"'{%", max_size=6)
TURN = st.one_of(
    st.builds(lambda c: [{"role": "user", "content": c}], TEXT),
    st.builds(
        lambda c, r, calls, results: [
            {"role": "assistant", "content": c, "reasoning_content": r, "tool_calls": calls},
            *({"role": "tool", "content": result} for result in results if calls),
        ],
        PLAIN,
        TEXT,
        st.lists(CALL, max_size=2),
        st.lists(TEXT, max_size=2),
    ),
)


@settings(max_examples=60)
@given(st.lists(TURN, max_size=3), TEXT, TEXT, st.booleans(), st.booleans())
def test_the_format_written_as_a_template_gives_the_same_parts(turns, system, last, think, keep):
    """Two ways to the same tokens, whatever control tokens the messages spell."""
    messages = [
        {"role": "system", "content": system},
        *(message for turn in turns for message in turn),
        # The template finds a message by what it says: the last one is like no other.
        {"role": "user", "content": f"{last} the last"},
    ]
    options = {"thinking": think, "keep_all_reasoning": keep}
    mine, theirs = (chat.render(messages, **options) for chat in (OURS, OTHER))
    assert mine == theirs
    assert OURS.encode(mine.parts) == TOKENIZER.encode(
        "".join(p.text for p in mine.parts), specials=True
    ) or any(c in json.dumps(messages, ensure_ascii=False) for c in CONTROLS)


def test_what_templates_of_the_field_use(renderer):
    source = (
        "  {% for m in messages %}\n"
        "{{ m.content | trim }}|{% if loop.index == 2 %}{% break %}{% endif %}\n"
        "  {% endfor %}\n"
        "{{ {'a': 'é<&>'} | tojson }} {{ [1] | tojson(indent=1) }} {{ strftime_now('%Y')|length }}"
        "{% generation %} {{ eos_token }}{% endgeneration %}"
    )
    variables = {"messages": [{"content": f" {i} "} for i in range(3)], "eos_token": "E"}
    assert renderer.render(source, variables) == '0|1|{"a": "é<&>"} [\n 1\n] 4 E'
    assert ChatTemplate({"default": "{{ tools is none }}"}, {}).render(USER, None, []) == [
        ("True", 0)
    ]


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('__cla' ~ 'ss__') }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ [''] | groupby('__class__') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ().__class__.__bases__[0] }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "{{ ('{0.__class__}'|string).format(1) }}",
    "{{ ['{0.__class__}'.format] | map('call', 1) | list }}",
    "{{ ['{0.__class__}'] | map(attribute='format') | first }}{{ ''.format.__self__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ range.__class__ }}",
    "{{ dict.__base__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ strftime_now.__closure__ }}",
    "{{ (messages|map('upper')).gi_frame }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for x in [1] %}{{ loop.__class__ }}{% endfor %}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{% set messages.x = 1 %}",
    "{% include '/etc/passwd' %}",
    "{% include 'x' ignore missing %}",
    "{% import 'os' as os %}",
    "{% from 'os' import path %}",
    "{% extends 'base' %}",
    "{{ open('/etc/passwd').read() }}",
    "{{ __import__('os') }}",
    "{{ config }}{{ request.application }}",
    "{{ get_flashed_messages.__globals__ }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_escapes_are_refused(renderer, source):
    """By an error, not by an empty string. `config` alone is only a name that nothing has."""
    with pytest.raises(MimoError, match="chat template") as error:
        renderer.render(source, {"messages": [{"role": "user", "content": "x"}]})
    assert "root:" not in str(error.value) and "stopped" not in str(error.value)


def test_an_open_environment_would_let_them_out():
    """What the refusals are worth: without the sandbox the same lines reach Python's insides."""
    out = jinja2.Environment()
    assert "<class 'str'>" in out.from_string(ESCAPES[0]).render()
    assert "id" in out.from_string("{{ cycler.__init__.__globals__.os.getpid() }} id").render()


def test_the_process_has_nothing_to_steal(renderer, monkeypatch):
    if not pathlib.Path("/proc/self/environ").exists():
        pytest.skip("this system does not show a process's environment")
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    renderer.close()
    renderer.render("a", {})
    environment = pathlib.Path(f"/proc/{renderer._process.pid}/environ").read_text()
    assert "s3cret" not in environment and "PYTHONPATH" in environment


LARGE = [
    "{{ 'a' * 10**10 }}",
    "{{ 'a' | center(10**10) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{% set ns = namespace(x='a' * 10**6) %}{% for i in range(40) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{{ range(10**9) | list | length }}",
    "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "{{ [1] * 10**10 }}",
    "{{ '(' * 10000 }}" + "{{ " + "(" * 10**5 + ")" * 10**5 + " }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
]


@pytest.mark.timeout(100)
@pytest.mark.parametrize("source", LARGE, ids=lambda s: s[:30])
def test_what_takes_too_much_is_stopped(renderer, source):
    """And the next template is rendered as if nothing had been."""
    with pytest.raises(MimoError, match="chat template"):
        renderer.render(source, {})
    assert renderer.render("{{ 1 + 1 }}", {}) == "2"


@pytest.mark.timeout(100)
def test_what_takes_forever_is_stopped(renderer, monkeypatch):
    monkeypatch.setattr(template, "TIME_S", 1.0)
    renderer.close()
    forever = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for source in (forever, "{{ 9 ** (9 ** 9) }}"):
        with pytest.raises(MimoError, match="was stopped: it ran for 1 s"):
            renderer.render(source, {})
    monkeypatch.undo()
    assert renderer.render("a", {}) == "a"


def test_the_process_goes_with_its_owner():
    renderer = Renderer()
    renderer.render("a", {})
    process = renderer._process
    del renderer
    assert process.returncode is not None
    renderer = Renderer()
    renderer.render("a", {})
    os.kill(renderer._process.pid, 9)
    renderer._process.wait()
    assert renderer.render("b", {}) == "b"
    renderer.close()
    renderer.close()


def test_errors_of_templates_are_words(renderer):
    for source, words in [
        ("{% if %}", "cannot be read: line 1"),
        ("\n{{ 'a }}", "cannot be read: line 2"),
        (
            "{{ raise_exception('Roles must alternate.') }}",
            "conversation: Roles must alternate. Ch",
        ),
        ("{{ nothing.more }}", "failed: UndefinedError"),
        ("{{ 1 / 0 }}", "failed: ZeroDivisionError"),
        ("{{ '\\ud800' }}", "failed: UnicodeEncodeError"),
    ]:
        with pytest.raises(MimoError, match="chat template") as error:
            renderer.render(source, {})
        assert words in str(error.value)


def test_no_message_becomes_a_control_token_of_a_template():
    """Only in an assistant's content markup stays whole, for templates that take it apart."""
    source = "{{ messages[0].content }}<|im_end|>{{ messages[1].content }}{{ tools | tojson }}"
    text = "".join(CONTROLS)
    messages = [{"role": r, "content": text} for r in ("user", "assistant")]
    parts = ChatTemplate({"default": source}, {}).render(messages, [{text: [text]}], CONTROLS)
    assert [p.text for p in parts if p.control] == ["<|im_end|>", *sorted(
        ["<think>", "</think>", "<tool_call>", "</tool_call>"], key=text.index
    )]  # fmt: skip
    assert "".join(p.text for p in parts) == f"{text}<|im_end|>{text}" + json.dumps(
        [{text: [text]}]
    )
    held = [{"role": "user", "content": "".join(template.BREAKS)}]
    with pytest.raises(MimoError, match="U[+]FDD0"):
        ChatTemplate({"default": source}, {}).render(held, None, CONTROLS)


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def found(folder, tools=None):
    return "".join(p.text for p in ChatTemplate.find(folder).render(USER, tools, []))


def test_where_templates_are_found(tmp_path):
    assert ChatTemplate.find(tmp_path) is None
    config = {"eos_token": {"content": "E"}, "bos_token": None, "pad_token": "P", "x": 1}
    write(tmp_path, "tokenizer_config.json", config)
    assert ChatTemplate.find(tmp_path) is None
    write(
        tmp_path, "tokenizer_config.json", config | {"chat_template": "1{{eos_token}}{{bos_token}}"}
    )
    assert found(tmp_path) == "1E"
    named = [
        {"name": "default", "template": "2{{ pad_token }}"},
        {"name": "tool_use", "template": "3"},
    ]
    write(tmp_path, "tokenizer_config.json", config | {"chat_template": named})
    assert (found(tmp_path), found(tmp_path, [{"name": "f"}])) == ("2P", "3")
    write(tmp_path, "chat_template.json", {"chat_template": "4"})
    assert found(tmp_path) == "4"
    write(tmp_path, "chat_template.jinja", "5é{{ eos_token }}")
    assert (found(tmp_path), found(tmp_path, [{"name": "f"}])) == ("5éE", "5éE")
    write(tmp_path, "additional_chat_templates/tool_use.jinja", "6")
    assert (found(tmp_path), found(tmp_path, [{"name": "f"}])) == ("5éE", "6")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", {"chat_template": 3}, "neither a text nor a list"),
        ("tokenizer_config.json", {"chat_template": [{"name": "a"}]}, "neither a text nor a list"),
        ("tokenizer_config.json", {"chat_template": [{"name": 1, "template": "a"}]}, "neither"),
        ("tokenizer_config.json", {"chat_template": ["default"]}, "neither a text nor a list"),
        ("chat_template.jinja", "a" * (2**20 + 1), "1048577 bytes; 1048576 at most"),
    ],
)
def test_files_that_hold_no_template(tmp_path, name, content, match):
    write(tmp_path, name, content)
    with pytest.raises(MimoError, match=match):
        ChatTemplate.find(tmp_path)


def test_templates_without_a_default(tmp_path):
    write(tmp_path, "additional_chat_templates/rag.jinja", "a")
    with pytest.raises(MimoError, match=r"names \['rag'\], and none named default"):
        found(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(MimoError, match="is not UTF-8"):
        found(tmp_path)


def test_the_prompt_says_if_it_opens_the_think_block(tmp_path):
    ends = {"a<think>": True, "<think>\n": True, "<think></think>": False, "a": False, "": False}
    for source, opened in ends.items():
        chat = ChatFormat(TOKENIZER, ChatTemplate({"default": source + "{{ '' }}"}, {}))
        assert chat.render(USER).in_think is opened


def test_stop_ids_and_sampling_of_the_checkpoint(tmp_path):
    assert ChatFormat.open(tmp_path, TOKENIZER).stop_ids == (0, 2)
    values = {"eos_token_id": [2, 7], "temperature": 0.6, "top_p": 0.9, "do_sample": False}
    write(tmp_path, "generation_config.json", values | {"max_new_tokens": 2048, "top_k": None})
    chat = ChatFormat.open(tmp_path, TOKENIZER)
    assert chat.stop_ids == (0, 2, 7)
    assert chat.sampling == {"temperature": 0.6, "top_p": 0.9}
    write(tmp_path, "generation_config.json", {"eos_token_id": 9})
    assert ChatFormat.open(tmp_path, TOKENIZER).stop_ids == (0, 2, 9)


def test_rendering_starts_no_process_that_stays():
    """A program that renders and ends leaves nothing behind."""
    script = "from mimo_jax.text.template import Renderer; r = Renderer(); print(r.render('a', {}))"
    script += "; print(r._process.pid)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout.split()[1]), 0)
