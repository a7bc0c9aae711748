"""My method: the messages, by hand."""

from my_method.method import with_sentence


def test_by_hand() -> None:
    system, question = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "1+1?"}
    expected = [system, {"role": "user", "content": "1+1? Please."}]
    assert with_sentence([system, question], "Please.") == expected
    assert question["content"] == "1+1?"
