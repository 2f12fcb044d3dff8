"""Personal data: counted and masked. Nothing is looked up and nothing is sent anywhere."""

import re

# Each pattern begins with the characters of the thing itself, which are quick to search for; what may not stand before
# them is asked afterwards: digits there belong to a longer number, a version or a decimal.
MAIL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%+\-]{0,63}@[A-Za-z0-9](?:[A-Za-z0-9\-]{0,62}\.)+[A-Za-z]{2,12}(?![A-Za-z])")
IDENTITY = re.compile(r"[1-9](?<![0-9A-Za-z][1-9])\d{16}[0-9Xx](?![0-9A-Za-z])")
MOBILE = re.compile(r"1(?<![0-9.]1)[3-9]\d(?:[ \-]?\d{4}){2}(?![0-9])(?!\.\d)")
FOREIGN_PHONE = re.compile(r"\+\d{1,3}(?:[ \-]\(?\d{2,4}\)?){3,4}(?![0-9])")
CHECK_WEIGHTS = tuple(2**i % 11 for i in range(17, 0, -1))
MASKS = {"mail": "[mail]", "identity": "[id]", "phone": "[phone]"}


def is_identity_number(number: str) -> bool:
    """Whether 18 characters are a Chinese identity number: its check digit holds (ISO 7064, MOD 11-2)."""
    total = sum(weight * int(digit) for weight, digit in zip(CHECK_WEIGHTS, number[:17], strict=True))
    check = (12 - total) % 11
    return number[17].upper() == ("X" if check == 10 else str(check))


def mask(text: str) -> tuple[str, int]:
    """The text with mail addresses, mobile numbers and identity numbers masked, and how many there were."""
    n_masked = 0

    def masked(name: str):
        def replace(match: re.Match) -> str:
            nonlocal n_masked
            if name == "identity" and not is_identity_number(match[0]):
                return match[0]
            n_masked += 1
            return MASKS[name]

        return replace

    if "@" in text:
        text = MAIL.sub(masked("mail"), text)
    text = IDENTITY.sub(masked("identity"), text)
    text = MOBILE.sub(masked("phone"), text)
    if "+" in text:
        text = FOREIGN_PHONE.sub(masked("phone"), text)
    return text, n_masked
