"""Rewards are the classifier's own output for each conversation, whatever the batch."""

import pytest
import torch
from tiny import reward_model

from lightning_itk.choice.rewards import RewardModel

CONVERSATIONS = [
    [{"role": "user", "content": "q" * (1 + i)}, {"role": "assistant", "content": "a" * (1 + 5 * i % 7)}]
    for i in range(5)
]


@pytest.mark.parametrize(("arch", "template"), [("llama", True), ("llama", False), ("bert", False)])
@torch.no_grad()
def test_rewards_do_not_depend_on_the_batch(tmp_path, arch, template):
    judge = RewardModel(reward_model(tmp_path, template, arch=arch))
    seen: list[int] = []
    rewards = judge(CONVERSATIONS, batch_size=2, progress=seen.append)
    assert seen == [2, 4, 5]
    for conversation, reward in zip(CONVERSATIONS, rewards, strict=True):
        ids = torch.tensor([judge.token_ids(conversation)["input_ids"]])
        assert float(judge.model(input_ids=ids).logits) == pytest.approx(reward, abs=1e-5)
    text = judge.tokenizer.decode(judge.token_ids(CONVERSATIONS[0])["input_ids"])
    assert text == ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n" if template else "qa")
    assert len(set(rewards)) == 5
    injected = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<pad>a"}]
    known = judge.tokenizer.all_special_ids
    specials = [sum(map(known.count, judge.token_ids(c)["input_ids"])) for c in (injected, CONVERSATIONS[0])]
    assert specials == [4, 4] if template else [0, 0]
    judge = RewardModel(reward_model(tmp_path, template, arch=arch), special_tokens="allow")
    assert sum(map(known.count, judge.token_ids(injected)["input_ids"])) == specials[0] + 1


def test_refusals(tmp_path, model_folder):
    with pytest.raises(ValueError, match="score.weight is not in it and would be random"):
        RewardModel(model_folder())
    with pytest.raises(ValueError, match="it has 3 outputs, expected 1"):
        RewardModel(reward_model(tmp_path / "three", labels=3))
    with pytest.raises(ValueError, match="does not exist"):
        RewardModel(str(tmp_path / "none"))
    judge = RewardModel(reward_model(tmp_path / "one"))
    long = [{"role": "user", "content": "q" * 200}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match=r"conversation 1 has \d+ tokens, the reward model .* reads 128"):
        judge([CONVERSATIONS[0], long])
    with torch.no_grad():
        judge.model.score.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="gives nan as a reward"):
        judge(CONVERSATIONS[:1])
