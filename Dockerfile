# Coordinator and clients of a federation; docker-compose.yml says who does what.
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

RUN useradd --create-home --uid 10001 pomona \
    && install --directory --owner pomona --group pomona --mode 0700 /var/lib/pomona \
    && install --directory --owner pomona --group pomona --mode 0700 /var/lib/pomona-claims

WORKDIR /src

# What changes seldom comes first, so that changed code installs nothing again but itself.
# Builds of torch without CUDA's packages; empty: torch comes from the package index like everything else.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt ./
RUN pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"

COPY pyproject.toml ./
RUN python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*project["dependencies"], *(each for extra in ("demo", "postgres") for each in \
project["optional-dependencies"][extra]), "setuptools", sep="\n")' > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt

COPY . .
RUN pip install --no-deps --no-build-isolation . && rm -rf build

USER pomona
WORKDIR /var/lib/pomona
ENV POMONA_HOME=/var/lib/pomona
ENTRYPOINT ["pomona"]
CMD ["--help"]
