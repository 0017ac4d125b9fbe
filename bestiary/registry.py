"""The one table of papers: slug -> configuration, models, trainer, and what a reader wants to know of the paper.

`bestiary.register` is public: a third party adds a paper of its own with the same call and gets auto classes,
`bestiary list`, cards and export. The table is strict: a slug, a `model_type` or a class that is there already
raises, because transformers itself replaces a registered configuration without a word.
"""

import importlib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto


@dataclass(frozen=True)
class Paper:
    """What bestiary knows of one paper.

    `models` maps the name of an auto class (`"AutoModelForMaskedLM"`) to the class that it resolves to. `trainer`,
    `arguments` and `converter` are names (`"package.module:Object"`, `"package.module"`), resolved on use: trainers
    import datasets and peft, which loading a model must not cost. `seq2seq_trainer` is that of pairs of texts, where
    `trainer` is another one.
    """

    slug: str
    title: str
    authors: str
    year: int
    summary: str
    config: type[PreTrainedConfig]
    models: dict[str, type[PreTrainedModel]]
    arxiv: str | None = None
    kind: str = "architecture"
    trainer: str | None = None
    seq2seq_trainer: str | None = None
    arguments: str | None = None
    collator: str | None = None
    converter: str | None = None
    official_code: str | None = None
    official_licence: str | None = None
    tags: tuple[str, ...] = field(default=())

    @property
    def url(self) -> str | None:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None

    @property
    def citation(self) -> str:
        """BibTeX entry, made from the fields."""
        lines = [
            f"title = {{{self.title}}}",
            f"author = {{{self.authors.replace(', ', ' and ')}}}",
            f"year = {{{self.year}}}",
        ]
        if self.arxiv:
            lines += [f"eprint = {{{self.arxiv}}}", "archivePrefix = {arXiv}"]
        return f"@article{{{self.slug}{self.year},\n  " + ",\n  ".join(lines) + "\n}"


_PAPERS: dict[str, Paper] = {}
_EXTENSIONS: dict[str, Paper] = {}


def register_extension(paper: Paper) -> Paper:
    """Add another configuration and its models to a registered paper: what the library offers beside its own model.

    The entry has the slug of the paper, and title, authors and identifiers of what it follows. It is loaded, exported
    and described like a paper, but not listed as one.

    Raises:
        ValueError: no paper has this slug, or as in `register`; the `model_type` is that of the paper, a hyphen and a
            name.
    """
    base = get_paper(paper.slug).config.model_type
    model_type = paper.config.model_type
    if not model_type.startswith(f"{base}-") or model_type in _EXTENSIONS:
        raise ValueError(
            f"register_extension: {paper.config.__name__}.model_type is {model_type!r}; it must be {base!r}, a hyphen "
            "and a name that no other extension has."
        )
    _register_classes(paper)
    _EXTENSIONS[model_type] = paper
    return paper


def register(paper: Paper) -> Paper:
    """Add a paper to the table and its classes to transformers' auto classes.

    Raises:
        ValueError: the slug, the `model_type` or a class name is registered already (by bestiary or by transformers),
            the `model_type` is not `<prefix>-<slug with hyphens>`, an auto class does not exist, or a model is built
            from another configuration. Then nothing of the paper is registered.
    """
    model_type = paper.config.model_type
    if paper.slug in _PAPERS:
        raise ValueError(
            f"register: the slug {paper.slug!r} is taken by {_PAPERS[paper.slug].title!r}; choose another slug."
        )
    suffix = "-" + paper.slug.replace("_", "-")
    if not model_type.endswith(suffix) or model_type == suffix:
        raise ValueError(
            f"register: {paper.config.__name__}.model_type is {model_type!r}; it must be a prefix of your package "
            "followed by "
            f"{suffix!r} (bestiary's own is 'bestiary{suffix}'), so that no release of transformers can claim the "
            "same type."
        )
    _register_classes(paper)
    _PAPERS[paper.slug] = paper
    return paper


def _register_classes(paper: Paper) -> None:
    model_type = paper.config.model_type
    _refuse_known_names(paper)
    models = [(_auto_class(paper.slug, auto_name), model) for auto_name, model in paper.models.items()]
    for _, model in models:
        if model.config_class is not paper.config:
            raise ValueError(
                f"register: {model.__name__} is built from {model.config_class and model.config_class.__name__}, not "
                f"from {paper.config.__name__}; annotate it with `config: {paper.config.__name__}`."
            )
    AutoConfig.register(model_type, paper.config)
    for auto_class, model in models:
        auto_class.register(paper.config, model)


def _refuse_known_names(paper: Paper) -> None:
    for known in (*_PAPERS.values(), *_EXTENSIONS.values()):
        if known.config.model_type == paper.config.model_type or known.config.__name__ == paper.config.__name__:
            raise ValueError(
                f"register: {paper.config.__name__} (model_type {paper.config.model_type!r}) of {paper.slug!r} "
                "clashes with "
                f"{known.config.__name__} of {known.slug!r}; auto classes resolve by name, so both must be unique."
            )
    if paper.config.__name__ in configuration_auto.CONFIG_MAPPING_NAMES.values():
        raise ValueError(
            f"register: transformers has a {paper.config.__name__} already and its auto classes resolve by class "
            "name; "
            "name yours after what it adds."
        )


def _auto_class(slug: str, name: str) -> Any:
    auto_class = getattr(modeling_auto, name, None)
    if auto_class is None or not name.startswith("AutoModel"):
        raise ValueError(
            f"register: paper {slug!r} names {name!r}, which is no auto class of "
            "transformers.models.auto.modeling_auto."
        )
    return auto_class


def list_papers(pattern: str = "*") -> list[str]:
    """Slugs of the registered papers that match a shell pattern, in alphabetical order.

    The pattern is matched, without regard to case, against the slug, the title and the tags:
    `list_papers("*attention*")`.
    """
    wanted = pattern.lower()
    return sorted(
        slug
        for slug, paper in _PAPERS.items()
        if any(fnmatchcase(text.lower(), wanted) for text in (slug, paper.title, paper.kind, *paper.tags))
    )


def get_paper(slug: str) -> Paper:
    """The entry of one paper; `ValueError` with the known slugs if there is none."""
    if slug not in _PAPERS:
        raise ValueError(f"No paper {slug!r} is registered; there are {', '.join(list_papers())}.")
    return _PAPERS[slug]


def paper_of(thing: Any) -> Paper | None:
    """The paper, or extension of one, whose configuration (instance, class, or that of a model) `thing` is, or
    None.
    """
    config = getattr(thing, "config", thing)
    model_type = getattr(config, "model_type", None)
    known = (*_PAPERS.values(), *_EXTENSIONS.values())
    return next((paper for paper in known if paper.config.model_type == model_type), None)


def load_object(name: str) -> Any:
    """Resolve `"package.module:Object"`, or `"package.module"` for the module itself."""
    module, _, attribute = name.partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded
