"""What Lambda's API answers when it does not do what it was asked, as sentences that say what to change."""

from __future__ import annotations

from click import ClickException

CONSOLE = "https://cloud.lambda.ai"
HELP = {
    "global/invalid-api-key": f"The key is wrong, expired or deleted. Make one at {CONSOLE}/api-keys and put it into "
    "~/.lambda_cloud/api_key or LAMBDA_API_KEY.",
    "global/account-inactive": "The account is not active: is the e-mail address confirmed, is there a payment method? "
    f"See {CONSOLE}.",
    "global/invalid-address": f"The account's billing address is not valid. Mend it at {CONSOLE}.",
    "global/quota-exceeded": "The account may not run more than it does. End instances, or ask Lambda for more.",
    "instance-operations/launch/file-system-in-wrong-region": "A file system is mounted in its own region only: set "
    "region_name to that of the file system, or name one of this region.",
}


class LambdaError(ClickException):
    """Lambda refused, or could not be reached. `ray up` and `ray down` print such an error without a traceback.

    `code` is the API's own name of the failure, "" for one that never got there.
    """

    def __init__(self, message: str, code: str = "", status: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.status = status

    def __str__(self) -> str:
        return self.message


class NoCapacity(LambdaError):
    """Nothing of the instance type is free in the region."""


class NotThere(LambdaError):
    """Lambda knows nothing by that name or id."""


class Unreachable(LambdaError):
    """No answer that can be used, although it was asked again and again. `nothing_done`: nothing got there either."""

    def __init__(self, message: str, nothing_done: bool = False) -> None:
        super().__init__(message)
        self.nothing_done = nothing_done


def refused(what: str, status: int, error: object) -> LambdaError:
    """The exception for an answer that is an error; `error` is the answer's own object, of whatever shape."""
    fields = error if isinstance(error, dict) else {}
    code, message = str(fields.get("code") or ""), str(fields.get("message") or "no message")
    kind = LambdaError
    if code == "instance-operations/launch/insufficient-capacity":
        kind = NoCapacity
    elif code == "global/object-does-not-exist":
        kind = NotThere
    help_text = HELP.get(code) or str(fields.get("suggestion") or "")
    return kind(f"Lambda refused {what}: {message} ({code or f'HTTP {status}'}) {help_text}".strip(), code, status)
