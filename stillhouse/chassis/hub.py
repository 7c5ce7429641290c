"""Weights of `hf://owner/name@<commit>`: listed and read from the hub, pinned to the commit.

Every file has a digest in the commit's listing (SHA-256, or git's own), and is checked against it.
Nothing is sent but requests for files; the token goes to the endpoint alone, since redirects to
other hosts drop it. It is the operator's own and a reference is anyone's, so it is sent for the
repositories of those owners only that the operator named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from stillhouse.chassis.origins import (
    ORIGIN_MISSING,
    ORIGIN_REFUSED,
    OriginRefused,
    OriginUnavailable,
    RemoteFile,
    may_be_fetched,
)

DEFAULT_ENDPOINT = "https://huggingface.co"
HUB_OFFLINE = "hub_offline"
HUB_AWAY = "hub_away"
_TIMEOUT = 20.0  # seconds without a byte
_BUSY = frozenset({408, 425, 429})
_OWNERS = "its HUB_TOKEN_OWNERS"
_ELSEWHERE = "or copy the folder to a place that the service may read and name it as file: or s3:"


class HubUnavailable(OriginUnavailable):
    """The hub did not answer, or is too busy to."""


@dataclass(frozen=True)
class HubAccess:
    """Which hub is asked, and as whom: with `token` for the repositories of `token_owners` (in
    small letters; `*`: everyone's), as nobody for others."""

    endpoint: str = DEFAULT_ENDPOINT
    token: str | None = field(default=None, repr=False)
    token_owners: frozenset[str] = frozenset()

    def token_for(self, repository: str) -> str | None:
        owner = repository.partition("/")[0].lower()
        return self.token if self.token_owners & {owner, "*"} else None


class HubRepository:
    """A repository at one commit. The library is imported when it is used, as it takes a while."""

    def __init__(self, reference: str, access: HubAccess) -> None:
        self.reference = reference
        self._repository, _, self._commit = reference.removeprefix("hf://").partition("@")
        self._access = access
        # False: never a token that someone left in the home folder.
        self._token = access.token_for(self._repository) or False
        self._files: dict[str, RemoteFile] | None = None

    def pin(self) -> str:
        return self._commit

    def files(self) -> Mapping[str, RemoteFile]:
        if self._files is None:
            self._files = self._list()
        return self._files

    def _list(self) -> dict[str, RemoteFile]:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._access.endpoint, token=self._token)
        with self._translated():
            try:
                found = api.model_info(
                    self._repository, revision=self._commit, files_metadata=True, timeout=_TIMEOUT
                )
            except (ValueError, TypeError, KeyError) as error:
                raise OriginRefused(
                    f"what answers at {self._access.endpoint} for {self.reference} is no hub "
                    f"({type(error).__name__}): check HF_ENDPOINT",
                    reason=ORIGIN_REFUSED,
                ) from error
        if found.sha != self._commit:
            raise OriginRefused(
                f"{self.reference}: the hub answered with commit {found.sha}: check the reference",
                reason=ORIGIN_REFUSED,
            )
        files = {}
        for sibling in found.siblings or ():
            name, size = sibling.rfilename, sibling.size
            if not may_be_fetched(name):
                continue
            sha256 = sibling.lfs.sha256 if sibling.lfs is not None else None
            git_sha1 = None if sha256 else sibling.blob_id
            digest = sha256 or git_sha1
            if size is None or digest is None:
                raise OriginRefused(
                    f"{self.reference}: the hub tells no size or digest of {name}, so that nobody "
                    f"could check what came: use another HF_ENDPOINT, {_ELSEWHERE}",
                    reason=ORIGIN_REFUSED,
                )
            files[name] = RemoteFile(name, size, digest, sha256, git_sha1)
        return files

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(
            self._repository,
            file.name,
            revision=self._commit,
            endpoint=self._access.endpoint,
        )
        headers = build_hf_headers(token=self._token, library_name="stillhouse")
        # Not compressed: a range then means the same bytes for everyone on the way.
        headers["accept-encoding"] = "identity"
        if start:
            headers["range"] = f"bytes={start}-"
        with (
            self._translated(),
            get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as answer,
        ):
            hf_raise_for_status(answer)
            skip = 0 if answer.status_code == 206 else start
            # As they come: gathered ones would be lost where the connection breaks.
            for chunk in answer.iter_bytes():
                dropped = min(skip, len(chunk))
                skip -= dropped
                if dropped < len(chunk):
                    yield chunk[dropped:]

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the library's errors into ours, each with what to do."""
        import httpx2
        from huggingface_hub import errors

        name = self.reference
        try:
            yield
        except errors.OfflineModeIsEnabled as error:
            raise OriginRefused(
                f"{name} is not fetched because HF_HUB_OFFLINE is set in the service's "
                f"environment: unset it, {_ELSEWHERE}",
                reason=HUB_OFFLINE,
            ) from error
        except errors.GatedRepoError as error:
            raise OriginRefused(
                f"{name} is gated: accept its licence on the hub, give the service the token of "
                f"that account as HF_TOKEN and name the owner in {_OWNERS}, {_ELSEWHERE}",
                reason=ORIGIN_REFUSED,
            ) from error
        except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
            raise OriginRefused(
                f"{name} is not on the hub at {self._access.endpoint}, or not for this service: "
                f"check the name; a private one takes HF_TOKEN, and its owner in {_OWNERS}",
                reason=ORIGIN_MISSING,
            ) from error
        except errors.RevisionNotFoundError as error:
            raise OriginRefused(
                f"{name}: the repository has no such commit: check it on the repository's page",
                reason=ORIGIN_MISSING,
            ) from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status in _BUSY or status >= 500:
                raise HubUnavailable(
                    f"the hub at {self._access.endpoint} answered {status} for {name}"
                ) from error
            raise OriginRefused(
                f"the hub at {self._access.endpoint} answered {status} for {name}: check the "
                f"reference, HF_TOKEN of the service and {_OWNERS}",
                reason=ORIGIN_REFUSED,
            ) from error
        except httpx2.HTTPError as error:
            raise HubUnavailable(
                f"the hub at {self._access.endpoint} cannot be reached for {name} "
                f"({type(error).__name__}): check the network and HF_ENDPOINT, {_ELSEWHERE}"
            ) from error
        except (errors.HFValidationError, httpx2.InvalidURL) as error:
            raise OriginRefused(f"{name}: {error}", reason=ORIGIN_REFUSED) from error
