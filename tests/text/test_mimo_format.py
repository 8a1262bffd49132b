"""MiMo's own format: the releases' token ids, both styles of calls, nothing smuggled in."""

import itertools

import pytest
from chat_tokenizers import MARKUP, SPECIAL, mimo_ids, small
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.errors import MimoError
from mimo_jax.text.answer import parse
from mimo_jax.text.chat import ChatFormat
from mimo_jax.text.mimo_format import SYSTEM
from mimo_jax.text.parts import Part, decode, encode, merge, remainder, split
from mimo_jax.text.tokenizer import Tokenizer, train_tokenizer

TOKENIZER = small()
CONTROLS = list(TOKENIZER.control_ids)
HELLO = [{"role": "user", "content": "Hello"}]
VECTOR = [151644, 8948, 198, 2610, 525, 20740, 25612, 11, 264, 10950, 15235, 17847, 44936, 553]
VECTOR += [71449, 13, 151645, 151644, 872, 198, 9707, 151645, 151644, 77091, 198, 151667, 151668]
"""The ids of MiMo-V2.5 for "Hello" without thinking, published by people who ran its tokenizer."""

TEXT = st.lists(
    st.one_of(
        st.sampled_from([*SPECIAL.values(), *MARKUP.values()]), st.text("ab<|\n é", max_size=4)
    ),
    max_size=5,
).map("".join)
"""Text that spells control tokens."""


def text_of(parts: list[Part]) -> str:
    return "".join(part.text for part in parts)


def rendered(messages, tools=None, tokenizer=TOKENIZER, compact=False, **options) -> str:
    prompt = ChatFormat(tokenizer, compact=compact).render(messages, tools, **options)
    return text_of(prompt.parts)


@pytest.fixture(scope="module")
def releases() -> Tokenizer:
    return mimo_ids()


def test_the_vector_of_the_releases(releases):
    """27 ids; with thinking the think block is the model's to open."""
    chat = ChatFormat(releases)
    prompt = chat.render(HELLO, thinking=False)
    assert chat.encode(prompt.parts) == VECTOR and len(VECTOR) == 27
    assert chat.encode(chat.render(HELLO).parts) == VECTOR[:-2]
    assert chat.stop_ids == (151643, 151645)
    assert releases.decode_bytes(VECTOR, controls=True).decode() == text_of(prompt.parts)


def test_turns_follow_without_a_newline():
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "r"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
        {"role": "user", "content": "f\n"},
    ]
    turns = ["system\nS", "user\nab", "assistant\n<think>r</think>c", "user\nd"]
    turns += ["assistant\n<think></think>e", "user\nf\n"]
    expected = "".join(f"<|im_start|>{turn}<|im_end|>" for turn in turns)
    assert rendered(messages) == expected + "<|im_start|>assistant\n"
    dropped = expected.replace("<think>r</think>", "<think></think>")
    closed = dropped + "<|im_start|>assistant\n<think></think>"
    assert rendered(messages, thinking=False, keep_all_reasoning=False) == closed


def test_reasoning_since_the_last_user_is_always_kept():
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "reasoning_content": "old"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "reasoning_content": "new", "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "1"},
    ]
    text = rendered(messages, keep_all_reasoning=False)
    assert "<think>new</think>" in text and "old" not in text
    assert "<think>old</think>" in rendered(messages)


@pytest.mark.parametrize(
    ("compact", "call"),
    [
        (
            False,
            "<tool_call>\n<function=f>\n<parameter=a>x\n y</parameter>\n<parameter=b>[1, null]"
            "</parameter>\n</function>\n</tool_call>",
        ),
        (
            True,
            "<tool_call><function=f><parameter=a>x\n y</parameter><parameter=b>[1, null]"
            "</parameter></function></tool_call>",
        ),
    ],
)
def test_tools_calls_and_results(compact, call):
    tools = [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": " does\n",
                "strict": True,
                "parameters": {
                    "type": "object",
                    "properties": {"a": {"type": "string", "description": "é", "enum": ["x"]}},
                    "required": ["a"],
                },
            },
        }
    ]
    arguments = {"a": "x\n y", "b": [1, None]}
    messages = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "c", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}},
            {"function": {"name": "f", "arguments": '{"a": "x\\n y", "b": [1, null]}'}},
        ]},
        {"role": "tool", "content": "one", "tool_call_id": "1"},
        {"role": "tool", "content": "two", "name": "f"},
    ]  # fmt: skip
    text = rendered(messages, tools, compact=compact)
    function = (
        "<tools>\n<function>\n<name>f</name>\n<description>does</description>\n<parameters>\n"
        "<parameter>\n<name>a</name>\n<type>string</type>\n<description>é</description>\n"
        '<enum>["x"]</enum>\n</parameter>\n<required>["a"]</required>\n</parameters>\n'
        "<strict>True</strict>\n</function>\n</tools>"
    )
    assert text.startswith(f"<|im_start|>system\n{SYSTEM}\n\n") and function in text
    results = "".join(f"<tool_response>\n{r}\n</tool_response>\n" for r in ("one", "two"))
    ending = f"<think></think>c{call}{call}<|im_end|><|im_start|>tool\n{results}<|im_end|>"
    assert text.endswith(f"{ending}<|im_start|>assistant\n")
    # The example that the model is shown is one that the parser understands.
    example = text[text.index("<tool_call>") : text.index("</tool_call>") + len("</tool_call>")]
    assert parse(example).tool_calls and not parse(example).problems


@given(st.lists(TEXT, min_size=5, max_size=5))
def test_no_content_becomes_a_control_token(texts):
    """Whatever it spells: the control tokens are those of a conversation of plain words."""

    def ids(system, user, reasoning, content, result):
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": user},
            {"role": "assistant", "content": content, "reasoning_content": reasoning,
             "tool_calls": [{"name": user or "n", "arguments": {"k": content}}]},
            {"role": "tool", "content": result},
        ]  # fmt: skip
        tools = [{"name": system, "description": user, "parameters": {"properties": {user: {}}}}]
        chat = ChatFormat(TOKENIZER)
        prompt = chat.render(messages, tools)
        ids = chat.encode(prompt.parts)
        assert TOKENIZER.decode_bytes(ids, controls=True).decode() == text_of(prompt.parts)
        return [id for id in ids if id in TOKENIZER.control_ids.values()]

    assert ids(*texts) == ids("s", "u", "r", "c", "t")


@given(TEXT)
def test_the_parts_of_a_text_are_what_the_tokenizer_sees(text):
    """The library's own splitting is the oracle; and ids come apart into the same parts."""
    parts = split(text, CONTROLS)
    assert text_of(parts) == text and parts == merge(parts)
    ids = encode(parts, TOKENIZER)
    assert ids == TOKENIZER.encode(text, specials=True)
    assert decode(ids, TOKENIZER) == parts
    literal = TOKENIZER.encode_literal(text)
    assert not set(literal) & set(TOKENIZER.control_ids.values())
    assert TOKENIZER.decode(literal) == text
    assert decode([*ids, TOKENIZER.vocab_size, *literal], TOKENIZER) == merge([*parts, Part(text)])


PARTS = st.lists(st.builds(Part, st.text("ab", min_size=1, max_size=3), st.booleans()), max_size=4)


@given(PARTS, PARTS, st.integers(0, 20))
def test_what_must_follow(held, added, cut):
    """Held and remainder make the whole, also if a stretch of text is cut."""
    held, wanted = merge(held), merge([*held, *added])
    if held and not held[-1].control:
        held[-1] = Part(held[-1].text[: 1 + cut % len(held[-1].text)])
    rest = remainder(held, wanted)
    assert rest is not None and merge([*held, *rest]) == wanted


@given(PARTS, PARTS)
def test_nothing_follows_what_differs(held, wanted):
    held, wanted = merge(held), merge(wanted)
    rest = remainder(held, wanted)
    if rest is None:
        texts = [[(c, p.control) for p in parts for c in p.text] for parts in (held, wanted)]
        ends = [list(itertools.accumulate(len(p.text) for p in x)) for x in (held, wanted)]
        same = texts[0] == texts[1][: len(texts[0])]
        assert not same or ends[0] != ends[1][: len(ends[0])]
    else:
        assert merge([*held, *rest]) == wanted


def test_a_base_model_says_what_it_lacks():
    plain = Tokenizer(train_tokenizer(iter(["abc def"] * 3), 262))
    with pytest.raises(MimoError, match=r"lacks <think>, </think>: it is a base model.*generate"):
        ChatFormat(plain, where="DIR").render(HELLO)
    for thinking in (1, None, "low"):
        with pytest.raises((MimoError, TypeError), match="thinking"):
            ChatFormat(TOKENIZER).render(HELLO, thinking=thinking)
