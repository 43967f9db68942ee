"""Pushing a dataset to the Hugging Face hub: the repository, then all files in one commit.

The token is that of `hf auth login` or HF_TOKEN; the hub is HF_ENDPOINT, else huggingface.co.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from rlaif.errors import ConfigError, EndpointError


def check_login(repository: str) -> None:
    """Ask the hub who the user is, before any work is done for nothing.

    Raises:
        ConfigError: the repository's name cannot be, or there is no valid token.
        EndpointError: the hub cannot be reached or fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported lazily

    hub = HfApi(library_name="rlaif")
    with _translated(hub.endpoint, repository):
        validate_repo_id(repository)
        hub.whoami()


def push(
    repository: str,
    files: Mapping[str, Path],
    message: str,
    *,
    replaces: Collection[str] = (),
    private: bool = False,
) -> str:
    """Make the dataset repository if it is missing and commit files to its main branch.

    One commit, so readers see the data and its card together or not at all.

    Args:
        repository: `name` or `owner/name`.
        files: what to upload, by path in the repository.
        message: of the commit.
        replaces: paths that are removed if the repository has them and `files` does not.
        private: make a repository that is created private; the hub's default otherwise.

    Returns:
        The commit's web address.

    Raises:
        ConfigError: the name cannot be, there is no valid token, or it may not write there.
        EndpointError: the hub cannot be reached or fails.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    hub = HfApi(library_name="rlaif")
    with _translated(hub.endpoint, repository):
        made = hub.create_repo(repository, repo_type="dataset", private=private or None, exist_ok=True)
        present = set(hub.list_repo_files(made.repo_id, repo_type="dataset"))
        commit = hub.create_commit(
            made.repo_id,
            [
                *(CommitOperationAdd(name, str(path)) for name, path in files.items()),
                *(CommitOperationDelete(name) for name in sorted((present & {*replaces}) - {*files})),
            ],
            commit_message=message,
            repo_type="dataset",
        )
    return str(commit.commit_url)


@contextmanager
def _translated(endpoint: str, repository: str) -> Iterator[None]:
    """Turn the hub's errors into ours."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    # The base error of its HTTP library, which is another one in other versions.
    http_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    login = "log in with `hf auth login` or set HF_TOKEN to a token that may write there"
    try:
        yield
    except HFValidationError as err:
        raise ConfigError(f"--push_to_hub {repository}: {err}") from err
    except LocalTokenNotFoundError as err:
        raise ConfigError(f"--push_to_hub {repository} needs a token: {login}") from err
    except HfHubHTTPError as err:
        if err.response.status_code in (401, 403):
            raise ConfigError(
                f"the hub at {endpoint} answers {err.response.status_code} for {repository}: {login}"
            ) from err
        raise EndpointError(f"the hub at {endpoint} failed: {err}; run the same command again") from err
    except (http_error, OfflineModeIsEnabled) as err:
        raise EndpointError(f"the hub at {endpoint} cannot be reached: {err}; check HF_ENDPOINT") from err
