"""A shop that no model knows: questions about its goods, and answers by its own rules, made by code."""

import random

GOODS = (
    *("oak shelf", "pine table", "wool blanket", "brass lamp", "clay mug", "linen towel", "cork board", "steel kettle"),
    *("glass vase", "felt hat", "birch stool", "copper pan", "silk scarf", "jute rug", "bamboo tray", "slate clock"),
)
DAYS = {"in the house": 2, "in the store": 5, "on order": 14}


def shop_records(count: int, seed: int) -> list[dict[str, str]]:
    """Questions with the sheet of a product, and the shop's answer. The same arguments give the same records."""
    rng = random.Random(f"shop {seed}")
    return [_record(rng) for _ in range(count)]


def _record(rng: random.Random) -> dict[str, str]:
    name, price, stock, where = rng.choice(GOODS), rng.randint(4, 240), rng.randint(0, 9), rng.choice([*DAYS])
    sheet = f"{name}; price {price} euros; stock {stock}; kept {where}"
    pieces = rng.randint(1, 4)
    question, answer = rng.choice(
        (
            (f"What does the {name} cost?", f"It is {price} euros."),
            (f"Do you have {pieces} of the {name}?", "Yes, we have." if stock >= pieces else f"No, only {stock} left."),
            (f"When will the {name} be here?", f"It comes in {DAYS[where]} days."),
            (f"May I return the {name}?", "Yes, within 30 days." if price >= 50 else "No, only goods from 50 euros."),
        )
    )
    return {"instruction": question, "context": sheet, "response": f"{answer} Yours, Lindgren & Daughters"}
