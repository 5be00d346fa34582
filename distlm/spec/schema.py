"""The JSON schema of all specs, for editors: `python -m distlm.spec.schema` rewrites the file that is shipped.

A spec that begins with `# yaml-language-server: $schema=distlm.schema.json` is completed and checked while it is typed.
"""

import json
from pathlib import Path
from typing import Any

from distlm.spec.curate import DEDUPS
from distlm.spec.load import KINDS
from distlm.spec.prepare import WHOLE

SHIPPED = Path(__file__).with_name("schema.json")


def generate() -> dict[str, Any]:
    """A JSON Schema (2020-12) in which `kind` decides what the other keys may be."""
    definitions: dict[str, Any] = {}
    for kind, model in KINDS.items():
        schema = model.model_json_schema(by_alias=True, ref_template="#/$defs/{model}")
        definitions.update(schema.pop("$defs", {}))
        schema["required"] = ["kind", *schema.get("required", [])]
        definitions[kind] = schema
    dedup = definitions["prepare"]["properties"]["dedup"]
    given = {key: dedup.pop(key) for key in [*dedup] if key not in ("description", "default")}
    dedup["anyOf"] = [{"enum": [*DEDUPS], "description": "The default settings of each."}, given]
    sources = definitions["prepare"]["properties"]["sources"]
    path = {"type": "string", "minLength": 1, "description": "The path of a source of format auto."}
    sources["items"] = {"anyOf": [path, sources["items"]]}
    split = definitions["Source"]["properties"]["split"]
    split["anyOf"] = [{"enum": [*WHOLE], "description": "The split of the whole source."}, *split["anyOf"]]
    definitions["pipeline"]["properties"]["steps"]["additionalProperties"] = False        # beside the pattern of their names
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A distlm job", "type": "object", "required": ["kind"],
            "properties": {"kind": {"enum": [*KINDS], "description": "The kind of the job."}},
            "allOf": [{"if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]}, "then": {"$ref": f"#/$defs/{kind}"}}
                      for kind in KINDS],
            "$defs": definitions}


def text() -> str:
    return json.dumps(generate(), indent=1) + "\n"


if __name__ == "__main__":
    SHIPPED.write_text(text())
