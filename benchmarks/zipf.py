"""How often is a tenant's set on the GPU already? A simulation, and the formula that it is held against.

    python benchmarks/zipf.py [--tenants 100000] [--gpus 10] [--places 64] [--exponent 1.0] [--json]

Tenants are asked for with Zipf's frequencies (the n-th most frequent 1/n^exponent as often as the first). Each GPU
keeps the `places` sets that it used last, as vLLM does. Requests go to a GPU in one of three ways:

    any       whichever: every GPU meets every tenant
    home      the tenant's own GPU, by a hash
    bounded   the first of the tenant's GPUs (its home, then others in an order of its own) that has less than 1.1
              times the mean load: consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018), as
              our gateway does it

Every tenant has a set of its own here; tenants with the same set share a place, so this is the hardest case.
"""

import argparse
import json
from collections import OrderedDict, deque
from math import gcd

import numpy

WAYS = ("any", "home", "bounded")
SLACK = 1.1  # times the mean load that a GPU takes before the next is asked
BATCH = 32  # answers under way for each GPU


def popularity(tenants, exponent):
    """Return each tenant's share of the requests, the largest first."""
    weights = numpy.arange(1, tenants + 1, dtype=float) ** -exponent
    return weights / weights.sum()


def simulate(shares, gpus, places, way, requests, seed=0):
    """Return the share of requests whose set is there, and the busiest GPU's load over the mean, after a warm-up.

    Args:
        shares: of the requests, by tenant.
        gpus: how many.
        places: sets that a GPU keeps.
        way: of WAYS.
        requests: how many; the first half warms up.
        seed: of all random numbers.
    """
    random = numpy.random.default_rng(seed)
    tenants = numpy.searchsorted(shares.cumsum(), random.random(requests)).clip(max=len(shares) - 1).tolist()
    homes = random.integers(gpus, size=len(shares)).tolist()
    all_steps = [step for step in range(1, max(gpus, 2)) if gcd(step, gpus) == 1]  # that come by every GPU
    steps = random.choice(all_steps, size=len(shares)).tolist()  # to the next GPU in a tenant's order
    anywhere = random.integers(gpus, size=requests).tolist()
    caches = [OrderedDict() for _ in range(gpus)]
    loads, under_way, totals = [0] * gpus, deque(), [0] * gpus
    hits = 0
    for n, tenant in enumerate(tenants):
        gpu = anywhere[n] if way == "any" else homes[tenant]
        if way == "bounded":
            limit = SLACK * (len(under_way) + 1) / gpus
            for _ in range(gpus):
                if loads[gpu] < limit:
                    break
                gpu = (gpu + steps[tenant]) % gpus
            if len(under_way) >= BATCH * gpus:
                loads[under_way.popleft()] -= 1
            under_way.append(gpu)
            loads[gpu] += 1
        cache, counts = caches[gpu], n >= requests // 2
        if tenant in cache:
            cache.move_to_end(tenant)
            hits += counts
        else:
            cache[tenant] = None
            if len(cache) > places:
                cache.popitem(last=False)
        totals[gpu] += counts
    counted = requests - requests // 2
    return hits / counted, max(totals) / (counted / gpus)


def expected(shares, gpus, places, way, seed=0):
    """Return the hit rate by Che's approximation (Che, Tung, Wang 2002), for the ways `any` and `home`.

    A set stays for a time T, in requests, such that the sets asked for within T fill the places.
    """
    if way == "any":
        return _che(shares, places)
    homes = numpy.random.default_rng(seed).integers(gpus, size=len(shares))
    order = numpy.argsort(homes, kind="stable")
    groups = numpy.split(shares[order], numpy.cumsum(numpy.bincount(homes, minlength=gpus))[:-1])
    return sum(group.sum() * _che(group / group.sum(), places) for group in groups if len(group))


def distinct(shares, rows):
    """Return how many different sets a batch of `rows` rows has, in the mean."""
    return float((1 - (1 - shares) ** rows).sum())


def _che(shares, places):
    if places >= len(shares):
        return 1.0
    low, high = 0.0, 1.0
    while -numpy.expm1(-shares * high).sum() < places:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if -numpy.expm1(-shares * middle).sum() < places else (low, middle)
    return float((shares * -numpy.expm1(-shares * low)).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenants", type=int, default=100_000)
    parser.add_argument("--gpus", type=int, default=10)
    parser.add_argument("--places", type=int, default=64)
    parser.add_argument("--exponent", type=float, default=1.0)
    parser.add_argument("--requests", type=int, default=400_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    shares = popularity(args.tenants, args.exponent)
    found = {}
    for way in WAYS:
        hits, busiest = simulate(shares, args.gpus, args.places, way, args.requests)
        formula = None if way == "bounded" else expected(shares, args.gpus, args.places, way)
        found[way] = {"hit_rate": hits, "formula": formula, "busiest_vs_mean": busiest}
        if not args.json:
            by_formula = "" if formula is None else f" ({100 * formula:.1f} % by the formula)"
            print(
                f"{way:8} {100 * hits:5.1f} % hits{by_formula}, the busiest GPU has {busiest:.2f} times the mean load"
            )
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
