"""Name the right argument for an unknown one, by its meaning: numberOfImages is n, output_dir is save_as."""

from __future__ import annotations

import re

# A message may contain a name of 1,000 characters.
NAME_MAX_CHARS = 64
# With one character more, a shorter name can be another word: mode is not model.
TYPO_MIN_CHARS = 5
# The first rule with a word of the name gives the argument, if the tool has one of its arguments. A star stands for the
# rest of a word.
# mask stands before image, because mask_image means mask_url. A count stands before it too: number_of_images is n.
RULES = (
    ("mask* inpaint*", ("mask_url",)),
    ("index", ("index",)),
    ("transparent transparency alpha background", ("background",)),
    ("n num number count counts quantity variation variations sample samples batch copies", ("n", "limit", "index")),
    ("callback* webhook*", ("callback_url",)),
    ("wait* timeout* deadline", ("wait_seconds",)),
    ("cost credit credits budget price", ("max_credits",)),
    ("format extension mime filetype", ("output_format", "format")),
    ("aspect* ratio size sizes width height dimension* imagesize", ("size", "targets")),
    ("out* save* filename", ("save_as",)),
    ("image images img imgs input inputs reference references init source photo* picture*", ("image_urls", "source")),
    ("path* folder file dir directory destination", ("save_as", "image_urls", "source", "task_id")),
    ("text description query instruction* caption", ("prompt", "query")),
    ("id task taskid job", ("task_id", "source")),
    ("force*", ("force_new",)),
)
PROMPT_PARTS = "negative* style* system*"
# Parameters of other image APIs, for example cfg_scale of Stable Diffusion and moderation of OpenAI.
UNSUPPORTED = frozenset(
    (
        *("seed", "steps", "num_inference_steps", "guidance", "guidance_scale", "cfg_scale", "sampler", "scheduler"),
        *("strength", "temperature", "user", "response_format", "output_compression", "compression", "moderation"),
        *("input_fidelity", "reasoning", "lora", "loras"),
    )
)
_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[^A-Za-z0-9]+")


def correction(name: str, names: list[str]) -> str:
    """Return the next step for an unknown argument: use another one of `names`, the prompt, or leave it out."""
    words = [word.lower() for word in _WORD_START.split(name[:NAME_MAX_CHARS]) if word]
    snake = "_".join(words)
    plain = "".join(words)
    own = next((each for each in names if each.replace("_", "") == plain), None)
    if own is not None:
        return f"did you mean {own}?"
    if "prompt" in names:
        if snake in UNSUPPORTED:
            return f"gpt-image-2 has no {snake}, leave it out"
        if _has_word(words, PROMPT_PARTS):
            return "write it into the prompt"
        if plain == "prompts":
            return "one prompt per call: call the tool once for each prompt, or generate_images once"
    meanings = next((meanings for terms, meanings in RULES if _has_word(words, terms)), None)
    if meanings is not None:
        match = next((each for each in meanings if each in names), None)
        return f"did you mean {match}?" if match else "leave it out"
    typo = next((each for each in names if _is_typo(snake, each)), None)
    return "leave it out" if typo is None else f"did you mean {typo}?"


def _has_word(words: list[str], terms: str) -> bool:
    """Return whether a word is one of the terms, or begins with one that ends with a star."""
    starts = tuple(term[:-1] for term in terms.split() if term.endswith("*"))
    whole = {term for term in terms.split() if not term.endswith("*")}
    return any(word in whole or word.startswith(starts) for word in words)


def _is_typo(name: str, argument: str) -> bool:
    """Return whether a name is the argument with one character more, fewer or swapped. The first character is right."""
    # A replaced character often makes another word: revolution is not resolution.
    if name[0] != argument[0]:
        return False
    if len(name) == len(argument):
        swaps = (name[:place] + name[place + 1] + name[place] + name[place + 2 :] for place in range(1, len(name) - 1))
        return argument in swaps
    if len(name) < TYPO_MIN_CHARS:
        return False
    longer, shorter = (name, argument) if len(name) > len(argument) else (argument, name)
    return any(longer[:place] + longer[place + 1 :] == shorter for place in range(1, len(longer)))
