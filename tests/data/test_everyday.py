from palate.data import read_prompts


def test_everyday_prompts_are_unique_and_held_out():
    train, test = read_prompts("everyday"), read_prompts("everyday", split="test")
    assert (len(train), len(test)) == (400, 100)
    texts = [" ".join(prompt.text.lower().split()) for prompt in train + test]
    assert len(set(texts)) == 500
    assert all(isinstance(prompt.content, str) and not prompt.columns for prompt in train + test)
