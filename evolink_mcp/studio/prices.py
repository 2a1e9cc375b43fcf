"""The prices of an account: EvoLink's published prices, corrected by the account's images and bills.

Three facts in the journal belong to an account and are shared by all its servers: the size rule that images showed, the
differences between bills and published prices, and the changes of both that no answer has reported yet.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import anyio
from pydantic import ValidationError

from evolink_mcp.api import costs, sizes
from evolink_mcp.api.models import ImageModel
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.api.sizes import Rule, Size
from evolink_mcp.api.task import COMPLETED
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.studio.size_rule import AUTO, PUBLISHED_RULE, SETTINGS, shown_by

if TYPE_CHECKING:
    from evolink_mcp.journal.entry import Entry
    from evolink_mcp.journal.journal import Journal

log = logging.getLogger(__name__)

RULE_FACT = "size_rule"
BILLS_FACT = "bills"
CHANGES_FACT = "price_changes"
# The kinds of changes. The name of a quality follows QUALITY.
FACTOR = "factor"
SIZE_RULE = "size_rule"
BILL_RULE = "bill_rule"
QUALITY = "quality "

# A bill may be this share below the computed price without a change of prices, because prompt tokens are estimated.
LOWER_BY_MAX = 0.05
# The uncertainty of a computed price, as a share, up to which a bill determines the price factor from below.
CERTAIN_WITHIN = 0.05
# EvoLink rounds each component of a charge up to 0.0001 credit.
CREDIT_ERROR = 0.0001
# A factor is rounded up to 0.0001, so that no price ceiling is too low.
FACTOR_STEP = 10_000


@dataclass(frozen=True, slots=True)
class Bills:
    """The differences between an account's bills and the published prices.

    `factor` multiplies every price. `rule` is a size rule by which EvoLink charges although the images follow another
    one. `qualities` maps a requested quality to the one whose price EvoLink charges. `changed_at` and `rule_changed_at`
    are the times of the purchases that showed the last changes: older purchases change nothing. `changed_by` is the task
    that showed the last change, and `previous` has the three values before it: later facts about this task replace the
    change. With `has_high_reservations`, EvoLink reserves more than it charges, so only final charges count.
    """

    factor: float = 1.0
    rule: Rule | None = None
    qualities: Mapping[str, str] = field(default_factory=dict[str, str])
    changed_at: float = 0.0
    rule_changed_at: float = 0.0
    changed_by: str | None = None
    previous: Mapping[str, Any] | None = None
    has_high_reservations: bool = False

    @classmethod
    def from_text(cls, text: str | None) -> Bills:
        """Return the content of the fact. A damaged fact counts as missing."""
        try:
            data: Any = json.loads(text or "{}")
            # A server of another version may have written other fields.
            bills = cls(**{each.name: data[each.name] for each in fields(cls) if each.name in data})
            is_valid = 0 < bills.factor < math.inf and bills.rule in (None, *sizes.RULES)
        except (ValueError, TypeError, RecursionError):
            is_valid = False
            bills = cls()
        return bills if is_valid else cls()

    def changed(self, entry: Entry, **values: Any) -> Bills:
        """Return the bills with some of the three values changed by an entry."""
        previous = {"factor": self.factor, "rule": self.rule, "qualities": self.qualities}
        return replace(self, **values, changed_at=entry.created_at, changed_by=entry.task_id, previous=previous)

    def without_change_by(self, task_id: str | None) -> Bills:
        """Return the bills before the change of this task, if it made the last one."""
        if self.previous is None or self.changed_by != task_id:
            return self
        return replace(self, **self.previous, changed_by=None, previous=None)


@dataclass(frozen=True, slots=True)
class Change:
    """A change of prices: the old and the new value, and the charge (credits) and task that showed it."""

    before: Any
    after: Any
    credits: float | None = None
    task_id: str | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """A charge or reservation that differs from the price of its request. Amounts are credits.

    `is_above`: it is above the price ceiling that the answer stated. `quality`: it equals the price of this quality.
    """

    credits: float
    ceiling: float
    is_above: bool
    is_final: bool
    quality: str | None


@dataclass(frozen=True, slots=True)
class Prices:
    """The prices of an account at one time. `pinned` is the size rule of the setting, None for auto."""

    pinned: Rule | None = None
    shown_rule: Rule | None = None
    bills: Bills = field(default_factory=Bills)

    @classmethod
    def from_facts(cls, facts: Mapping[str, str], setting: str = AUTO) -> Prices:
        """Return the prices of the account's facts in the journal. `setting` is one of SETTINGS."""
        pinned: Rule | None = next((rule for rule in sizes.RULES if rule == setting), None)
        shown_rule: Rule | None = next((rule for rule in sizes.RULES if rule == facts.get(RULE_FACT)), None)
        return cls(pinned, shown_rule, Bills.from_text(facts.get(BILLS_FACT)))

    @property
    def rule(self) -> Rule:
        """The rule for computed sizes: EvoLink's published one until an image shows another one."""
        return self.pinned or self.shown_rule or PUBLISHED_RULE

    @property
    def is_rule_known(self) -> bool:
        """Whether a saved image showed `rule`."""
        return self.shown_rule == self.rule

    @property
    def possible_rules(self) -> tuple[Rule, ...]:
        """The rules by which EvoLink may charge. The price ceiling uses the most expensive one."""
        if self.pinned is None and self.shown_rule is None:
            return sizes.RULES
        return tuple(dict.fromkeys((self.rule, self.bills.rule or self.rule)))

    @property
    def factor(self) -> float:
        """The factor on EvoLink's published prices."""
        return self.bills.factor

    def ceiling(self, request: GenerationRequest) -> float:
        """Return the price ceiling of a request in credits."""
        model = request.image_model
        return self.at_most(
            [sizes.resolve(request.size, request.resolution, rule, model.limits).size for rule in self.possible_rules],
            request.quality,
            request.n,
            references=references_of(request),
            prompt_bytes=len(request.prompt.encode("utf-8", "surrogatepass")),
            model=model,
        )

    def at_most(self, candidates: Iterable[Size | None], quality: str, n: int = 1, **options: Any) -> float:
        """Return the highest possible charge of one of these sizes in credits. `options` are arguments of `costs.at_most`."""
        possible = list(candidates)
        # EvoLink may charge the price of the requested quality again.
        qualities = {quality, self.bills.qualities.get(quality, quality)}
        return max(costs.at_most(possible, each, n, factor=self.factor, **options) for each in qualities)

    def estimate(self, size: Size | None, quality: str, n: int = 1) -> float:
        """Return the expected charge in credits, without the prompt and reference images."""
        return round(costs.price(size, quality, n).credits * self.factor, 4)


def price_of(request: GenerationRequest, rules: Iterable[Rule]) -> float:
    """Return the price ceiling of a request by the published prices: the highest price under any of these size rules."""
    return max(Prices(pinned=rule).ceiling(request) for rule in rules)


def references_of(request: GenerationRequest) -> int:
    """Return the number of input images that EvoLink charges."""
    return len(request.image_urls or ()) + (1 if request.mask_url else 0)


class AccountPrices:
    """The prices of an account, as this server last read them. `setting` is one of SETTINGS."""

    def __init__(self, journal: Journal, setting: str = AUTO) -> None:
        if setting not in SETTINGS:
            raise ValueError(f"the size rule is not one of {', '.join(SETTINGS)}")
        self.current = Prices.from_facts({}, setting)
        self.is_current = True  # the last read succeeded
        self._journal = journal
        self._setting = setting
        self._read_at = -math.inf

    def of(self, facts: Mapping[str, str]) -> Prices:
        """Return the prices of facts that were just read, and use them from now on."""
        self.current = Prices.from_facts(facts, self._setting)
        return self.current

    async def refresh(self, fresh_for_s: float = 0.0, wait_max_s: float | None = None) -> Prices:
        """Read the facts of all servers, unless the last read is younger than `fresh_for_s` seconds.

        If the journal cannot be read, or not within `wait_max_s` seconds, nothing changes and `is_current` is false.
        """
        if time.monotonic() - self._read_at >= fresh_for_s:
            # Before the read, so that other calls use the last prices meanwhile.
            self._read_at = time.monotonic()
            self.is_current = False
            with anyio.move_on_after(wait_max_s):
                try:
                    self.of(await self._journal.facts())
                    self.is_current = True
                except JournalUnwritable as error:
                    log.info("%s", error.message)
        return self.current

    def learn(self, entry: Entry, facts: Mapping[str, str]) -> dict[str, str]:
        """Return the facts that an entry changes. `facts` are those of the account in the journal."""
        return learn(entry, facts, self._setting)


# --- learning from images and bills ---


def learn(entry: Entry, facts: Mapping[str, str], setting: str = AUTO) -> dict[str, str]:
    """Return the facts that the images and the charge of an entry change. The pending changes are among them.

    An image proves a size rule only if the two tables differ for its request and one of them has its pixels.
    """
    # An unconfirmed match or a task of another program proves nothing about this request.
    if entry.task is None or entry.is_unconfirmed or not entry.request or not entry.account:
        return {}
    before = Prices.from_facts(facts, setting)
    # The final charge and the pixels of a task replace the conclusion from its reservation.
    start = replace(before, bills=before.bills.without_change_by(entry.task_id))
    after = _with_bill(entry, _with_rule(entry, start))
    if after == before:
        return {}
    values = {
        BILLS_FACT: json.dumps(asdict(after.bills)),
        CHANGES_FACT: _with_changes(facts.get(CHANGES_FACT), before, after, entry),
    }
    if after.shown_rule is not None:
        values[RULE_FACT] = after.shown_rule
    return {name: value for name, value in values.items() if value != facts.get(name, "")}


def read_changes(text: str | None) -> dict[str, Change]:
    """Return the changes that no answer has reported, by their kind. A damaged fact counts as missing."""
    try:
        data: dict[str, dict[str, Any]] = json.loads(text or "{}")
        return {kind: Change(**values) for kind, values in data.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _with_changes(text: str | None, before: Prices, after: Prices, entry: Entry) -> str:
    """Return the unreported changes with those of an entry. A change that is taken back before its report disappears."""
    pending = read_changes(text)
    credits = entry.charge or (entry.task.credits_reserved if entry.task else None)
    for kind, (old, new) in _differences(before, after).items():
        earlier = pending.pop(kind, None)
        old = earlier.before if earlier is not None else old
        if old != new:
            pending[kind] = Change(old, new, credits, entry.task_id)
    return json.dumps({kind: asdict(change) for kind, change in pending.items()}) if pending else ""


def _differences(before: Prices, after: Prices) -> dict[str, tuple[Any, Any]]:
    """Return the old and the new value of each changed price, by the kind of the change."""
    values: dict[str, tuple[Any, Any]] = {FACTOR: (before.factor, after.factor)}
    # Images that follow the table of the bills confirm a change that the bill showed before.
    if after.shown_rule is None or after.shown_rule != before.bills.rule:
        values[SIZE_RULE] = (before.shown_rule, after.shown_rule)
        values[BILL_RULE] = (before.bills.rule, after.bills.rule)
    for quality in {**before.bills.qualities, **after.bills.qualities}:
        old = before.bills.qualities.get(quality, quality)
        values[f"{QUALITY}{quality}"] = (old, after.bills.qualities.get(quality, quality))
    return {kind: (old, new) for kind, (old, new) in values.items() if old != new}


def _with_rule(entry: Entry, prices: Prices) -> Prices:
    delivered_rule = shown_by(entry)
    if delivered_rule is None or delivered_rule == prices.shown_rule or entry.created_at < prices.bills.rule_changed_at:
        return prices
    rule = None if prices.bills.rule == delivered_rule else prices.bills.rule
    return replace(
        prices, shown_rule=delivered_rule, bills=replace(prices.bills, rule=rule, rule_changed_at=entry.created_at)
    )


@dataclass(frozen=True, slots=True)
class _Range:
    """The lowest and the highest published price of a request in credits, and the probable one between them."""

    low: float
    high: float
    probable: float

    def has(self, credits: float, factor: float, *, lower_by: float = 0.0) -> bool:
        """Return whether `credits` is such a price times `factor`. It may be lower by this share."""
        low = self.low * factor * (1 - lower_by)
        return low - CREDIT_ERROR <= credits <= self.high * factor + CREDIT_ERROR

    def factor_of(self, credits: float) -> float:
        """Return the factor between these credits and the price, rounded up."""
        is_certain = self.high <= self.low * (1 + CERTAIN_WITHIN)
        return math.ceil(credits / (self.low if is_certain else self.probable) * FACTOR_STEP) / FACTOR_STEP


@dataclass(frozen=True, slots=True)
class _Request:
    """An entry's request with the number of images that EvoLink charges, and their pixels if they are saved."""

    request: GenerationRequest
    count: int
    measured: Size | None

    @classmethod
    def of(cls, entry: Entry) -> _Request | None:
        """Return the request, or None if this version cannot read it."""
        try:
            request = GenerationRequest.model_validate(entry.body)
        except ValidationError:
            return None
        task = entry.task
        is_final = task is not None and task.settled and bool(task.results)
        # EvoLink may make fewer images than requested, and bills those.
        count = min(len(task.results), request.n) if task is not None and is_final else request.n
        pixels = {(image.width, image.height) for image in entry.images}
        width, height = pixels.pop() if len(pixels) == 1 else (None, None)
        return cls(request, count, Size(width, height) if width and height else None)

    def ranges(self, rules: Iterable[Rule], quality: str) -> list[_Range]:
        """Return the prices in a quality: one range for each possible size."""
        model = self.request.image_model
        if quality not in model.qualities:
            return []
        resolved = {
            sizes.resolve(self.request.size, self.request.resolution, rule, model.limits).size for rule in rules
        }
        if None in resolved and self.measured is None:
            low, high = (self._range(Size(*size), quality, model) for size in model.auto_sizes)
            return [_Range(low.low, high.high, high.high)]
        shapes = {size for size in (*resolved, self.measured) if size is not None}
        return [self._range(size, quality, model) for size in sorted(shapes, key=lambda size: size.pixels)]

    def _range(self, size: Size, quality: str, model: ImageModel) -> _Range:
        prompt = self.request.prompt
        references = references_of(self.request)
        prompt_bytes = len(prompt.encode("utf-8", "surrogatepass"))

        def price(n: int, **options: int) -> float:
            return costs.price(size, quality, n, model=model, **options).credits

        return _Range(
            # The tokens of prompt and reference images are unknown, so the lowest price has none.
            price(self.count),
            price(self.request.n, references=references, prompt_tokens=prompt_bytes),
            price(self.count, references=references, prompt_tokens=costs.prompt_tokens(prompt)),
        )


def _with_bill(entry: Entry, prices: Prices) -> Prices:
    """Return the prices after the charge of an entry, or after its reservation while the charge is not known."""
    task = entry.task
    request = _Request.of(entry)
    if task is None or request is None or entry.created_at < prices.bills.changed_at:
        return prices
    # Only a completed task shows a price.
    charge = entry.charge if task.status == COMPLETED else None
    if charge:
        after = replace(prices, bills=_explain(entry, request, prices, charge, is_final=True))
        return _with_reservation(request, after, task.credits_reserved, charge)
    reservation = task.credits_reserved
    if task.settled or not reservation or prices.bills.has_high_reservations:
        return prices
    return replace(prices, bills=_explain(entry, request, prices, reservation, is_final=False))


def _explain(entry: Entry, request: _Request, prices: Prices, credits: float, *, is_final: bool) -> Bills:
    """Return bills that explain a charge, by the first explanation that fits: table, quality, factor.

    A reservation can only raise prices, because EvoLink may charge less at the end.
    """
    bills = prices.bills
    quality = request.request.quality
    billed_quality = bills.qualities.get(quality, quality)
    expected = request.ranges(prices.possible_rules, billed_quality)

    def is_price(rules: Iterable[Rule], name: str, factor: float) -> bool:
        return any(each.has(credits, factor) for each in request.ranges(rules, name))

    if any(each.has(credits, bills.factor, lower_by=LOWER_BY_MAX) for each in expected):
        if bills.rule is None or not is_final:
            return bills
        # The charge may fit only by the table of the images. Then the table of earlier bills is obsolete.
        by_bills = replace(request, measured=None).ranges((bills.rule,), billed_quality)
        is_by_bills = any(each.has(credits, bills.factor, lower_by=LOWER_BY_MAX) for each in by_bills)
        return bills if is_by_bills else bills.changed(entry, rule=None)
    if not is_final and credits <= max(each.high for each in expected) * bills.factor:
        return bills
    if is_price(sizes.RULES, billed_quality, bills.factor):
        (other_rule,) = set(sizes.RULES) - {prices.rule}
        return bills.changed(entry, rule=other_rule)
    other_qualities = {requested: charged for requested, charged in bills.qualities.items() if requested != quality}
    names = (quality, *(each for each in request.request.image_model.qualities if each != quality))
    # A discount may have ended, so the published price is tried too.
    for factor in dict.fromkeys((bills.factor, 1.0)):
        for name in names:
            if is_price(prices.possible_rules, name, factor):
                qualities = other_qualities if name == quality else {**other_qualities, quality: name}
                return bills.changed(entry, factor=factor, qualities=qualities)
    by_rule = request.ranges((prices.rule,), quality)
    return bills.changed(entry, factor=by_rule[-1].factor_of(credits), qualities=other_qualities)


def _with_reservation(request: _Request, prices: Prices, reservation: float | None, charge: float) -> Prices:
    """Return the prices with the knowledge whether EvoLink reserves more than it charges."""
    if reservation is None:
        return prices
    quality = request.request.quality
    ranges = request.ranges(prices.possible_rules, prices.bills.qualities.get(quality, quality))
    is_high = bool(ranges) and reservation > max(charge, *(each.high * prices.factor for each in ranges)) + CREDIT_ERROR
    if is_high == prices.bills.has_high_reservations or (not is_high and reservation != charge):
        return prices
    return replace(prices, bills=replace(prices.bills, has_high_reservations=is_high))


def difference_of(entry: Entry) -> Difference | None:
    """Return the difference between an entry's charge or reservation and the price that was computed for it, if any."""
    task = entry.task
    if task is None or not entry.estimate or entry.is_unconfirmed:
        return None
    is_final = entry.charge is not None
    credits = entry.charge if is_final else task.credits_reserved
    request = _Request.of(entry)
    if not credits or request is None:
        return None
    is_above = credits > entry.estimate + CREDIT_ERROR
    requested = request.request.quality
    other_qualities = (each for each in request.request.image_model.qualities if each != requested)
    quality: str | None = None
    if is_final and not _has_price(request, requested, credits, entry.price_factor, lower_by=LOWER_BY_MAX):
        quality = next(
            (each for each in other_qualities if _has_price(request, each, credits, entry.price_factor)), None
        )
    if not is_above and quality is None:
        return None
    return Difference(credits, entry.estimate, is_above, is_final, quality)


def _has_price(request: _Request, quality: str, credits: float, factor: float, *, lower_by: float = 0.0) -> bool:
    return any(each.has(credits, factor, lower_by=lower_by) for each in request.ranges(sizes.RULES, quality))
