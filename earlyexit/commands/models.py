"""Commands about models: published ones continue a text, existing ones are probed."""

from __future__ import annotations

import argparse
import inspect
import logging
import threading
import time
from pathlib import Path

import torch

import earlyexit
from earlyexit.commands.common import Add, device_of
from earlyexit.corpus.documents import CorpusConfig
from earlyexit.corpus.foreign import foreign_corpus
from earlyexit.corpus.load import encode_texts
from earlyexit.evaluation.decoding import gated_drafts
from earlyexit.models.attach import attach
from earlyexit.runs.paths import project
from earlyexit.runs.profiles import PROFILES
from earlyexit.runs.published import Published
from earlyexit.runs.settings import UsageError

log = logging.getLogger("earlyexit")


def add_commands(add: Add) -> None:
    """Add generate, probe and names."""
    words = add(
        _generate, "continue a text, and say what it took",
        'generate --profile cpu --prompt "My fellow citizens," --temperature 0.8',
        description="Words leave at the exits that the certified policy of a published model allows."
        " With --drafts they are those of full depth.",
    )  # fmt: skip
    words.add_argument("--prompt", required=True, help="text to continue")
    words.add_argument("--profile", default="cpu", help="with published weights")
    words.add_argument("--seed", type=int, default=0, help="of the model (default: 0)")
    words.add_argument("--words", type=int, default=60, help="new words (default: 60)")
    words.add_argument(
        "--temperature", type=float, default=0.0, help="0: the most probable word (default)"
    )
    words.add_argument(
        "--top-p", type=float, default=1.0, help="draw among the fewest words of this share"
    )
    words.add_argument("--seed-of-words", type=int, default=0, help="of the words that are drawn")
    words.add_argument(
        "--drafts", type=int, default=0, metavar="N",
        help="exits only propose, up to N words; the last layer verifies them",
    )  # fmt: skip
    words.add_argument("--full-depth", action="store_true", help="all layers, no exits")
    words.add_argument("--data-dir", default="", metavar="DIR", help="folder with local text")

    asked = add(
        _probe, "would early exit pay for an existing model?", "probe smollm2 --tokens 20000",
        description="Gives a Hugging Face decoder exits, fits them on a text, certifies policies, and"
        " says on one page what they save. A probe that was stopped goes on where it was.",
    )  # fmt: skip
    asked.add_argument("model", metavar="MODEL", help="name on the hub, folder, or smollm2")
    asked.add_argument(
        "--text", default="", metavar="DIR", help="folder of .txt files (or WikiText)"
    )
    asked.add_argument(
        "--corpus", default=None, help="sotu, wikitext-2 or folder (default: folder, with --text)"
    )
    asked.add_argument("--tokens", type=int, default=100_000, help="to fit on; they set the time")
    asked.add_argument(
        "--document-tokens", type=int, default=256, metavar="N",
        help="to which documents are cut that fit thresholds, certify and test (default: 256)",
    )  # fmt: skip
    asked.add_argument("--exits", type=int, help="number of exits; divides the model's layers")
    asked.add_argument("--n-seq", type=int, default=256, metavar="N", help="tokens of a window")
    asked.add_argument("--epsilon", type=float, default=0.05, help="tolerated loss of the verdict")
    asked.add_argument(
        "--assisted-tokens", type=int, default=0, metavar="N",
        help="also time drafts by exits, here and by other libraries, on N new tokens",
    )  # fmt: skip
    asked.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")

    add(_names, "the package's public names, with a line each", "names")


def _generate(options: argparse.Namespace) -> int:
    device_of("cpu", 1)
    published = earlyexit.load(options.profile, options.seed, options.data_dir or None, "cpu")
    model, corpus = published.model, published.corpus
    patience = threading.Timer(
        3, log.info, ["compiling the loops that say words, about a minute, once"]
    )
    try:
        ids = encode_texts(corpus, [options.prompt], "prompt").ids[:-1]  # the line goes on
        how = _decoding(options, published)
        prompt, seed = torch.from_numpy(ids).long()[None], options.seed_of_words
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        # Once unheard: what is refused is refused before a word, and loops are compiled.
        patience.start()
        model.decode(prompt, options.words, generator=generators[0], **how)
    except ValueError as error:
        raise UsageError(str(error)) from None
    finally:
        patience.cancel()
    log.info("%d of %d words are not known", (ids == corpus.unk_id).sum(), len(ids))
    word = corpus.config.tokenizer == "word"

    def told(_: int, words: list[int]) -> None:
        for one in corpus.decode(words):
            text = "\n" if one == "<eos>" else f" {one}" if word else one
            print(text, end="", flush=True)

    print(options.prompt, end="", flush=True)
    start = time.perf_counter()
    made = model.decode(prompt, options.words, generator=generators[1], told=told, **how)
    pace, layers = made.new.sum() / (time.perf_counter() - start), made.layers
    print(f"\n\n{pace:,.0f} words per second, {layers:.2f} of {model.n_layers} layers per word")
    return 0


def _decoding(options: argparse.Namespace, published: Published) -> dict:
    """Return how words are decoded, as arguments of a model's ``decode``."""
    how = {"temperature": options.temperature, "top_p": options.top_p}
    if options.drafts:
        (drafted,) = gated_drafts(published.model.n_layers, [0.8], options.drafts).values()
        return how | drafted
    if options.full_depth:
        return how
    if published.policy is None:
        log.info("no policy is certified for this model: every word takes all layers")
    return how | {"policy": published.policy}


def _probe(options: argparse.Namespace) -> int:
    from earlyexit.runs import decoders, probe, probe_page

    device_of("cpu", options.threads)
    try:
        name = options.corpus or ("folder" if options.text else "sotu")
        # Certificates want many documents: as many articles as in the profiles on WikiText.
        certify = PROFILES["wikitext2"].corpus.certify_articles if "wikitext" in name else 0
        text = CorpusConfig(name, data_dir=options.text or None, certify_articles=certify)
        config = probe.ProbeConfig(
            tokens=options.tokens,
            document_tokens=options.document_tokens,
            epsilons=tuple(sorted({*probe.ProbeConfig.epsilons, options.epsilon})),
            assisted_tokens=options.assisted_tokens,
        )
        if options.text and not Path(options.text).is_dir():
            raise ValueError(f"--text {options.text}: there is no such folder")
        folder = project().cache
        decoder, tokenizer = decoders.open_decoder(options.model, folder)
        model = attach(decoder, tokenizer, options.exits, n_seq=options.n_seq)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{options.model} has no fast tokenizer: a probe needs one")
        corpus = foreign_corpus(text, backend, model.eos_id, config.tokens)
        asked = probe.Probe(model, corpus, config, folder / "probe")
    except (ImportError, TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
    log.info("about %.0f minutes, less what is kept of an earlier one", 1 + asked.minutes())
    print(probe_page.page(asked, options.epsilon))
    return 0


def _names(_: argparse.Namespace) -> int:
    for name in earlyexit.__all__:
        found = getattr(earlyexit, name)
        told = ", ".join(found) if isinstance(found, dict) else inspect.getdoc(found)
        print(f"{name:<26} {told.splitlines()[0]}")
    return 0
