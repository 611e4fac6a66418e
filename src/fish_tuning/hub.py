"""Find files in a local folder or on the Hugging Face hub, and give up soon without a network."""

import os
from pathlib import Path

SECONDS = 3.0
"""How long the hub may take to say whether a repository exists."""


def ask_hub(
    repository: str,
    *,
    repo_type: str = "model",
    revision: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Ask the hub once whether a repository exists; its downloads retry for half a minute.

    Raises:
        HFValidationError: The name cannot be that of a repository.
        RepositoryNotFoundError: There is no such repository, or it may not be read.
        Exception: The hub cannot be reached. Its HTTP clients have no common base class for this.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    try:
        HfApi().repo_info(
            repository, repo_type=repo_type, revision=revision, token=token, timeout=SECONDS
        )
    except Exception as error:
        # A slow hub is not a missing one, and the download waits longer.
        if "Timeout" not in type(error).__name__:
            raise


def find_file(
    directory: str | os.PathLike[str],
    filename: str,
    *,
    contents: str,
    writer: str,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Find a file in a local folder, or download it from the hub.

    Without a network, a copy that was downloaded earlier is used.

    Args:
        directory: A local folder or, if there is no folder of that name, a repository id.
        filename: The file to find.
        contents: What the file holds, for messages: "FISH mask".
        writer: The function that writes such files, for messages.
        revision: Branch, tag or commit on the hub.
        token: Access token for the hub; True means the stored one.

    Raises:
        FileNotFoundError: It is in neither place.
        TypeError: `directory` is not a path.
    """
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(
            f"a {type(directory).__name__} is not a folder: name the one that {writer} wrote, or "
            "a hub repository"
        )
    if (folder := Path(directory)).is_dir():
        if not (path := folder / filename).is_file():
            inside = sorted(str(found.parent) for found in folder.glob(f"*/{filename}"))
            raise FileNotFoundError(
                f"{path} does not exist: {folder} holds no complete {contents}. Name the folder "
                f"that {writer} wrote" + (f", such as {inside[0]}" if inside else "") + "."
            )
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    offline: Exception | None = None
    try:
        try:
            ask_hub(str(directory), revision=revision, token=token)
        except (HFValidationError, RepositoryNotFoundError):
            raise
        except Exception as error:
            offline = error
        downloaded = hf_hub_download(
            str(directory),
            filename,
            revision=revision,
            token=token,
            local_files_only=offline is not None,
        )
    # The hub raises ValueErrors for a bad id and OSErrors for a failed download.
    except (OSError, ValueError) as error:
        reason = (str(offline or error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{directory} is not a local folder, and {filename} could not be downloaded from a "
            f"hub repository of that name ({reason}). Name the folder that {writer} wrote, or a "
            "repository that holds its files."
        ) from error
    return Path(downloaded)
