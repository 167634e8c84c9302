// Renders openapi.json: each route's parameters, body and answer, and a curl command to copy.

const $ = (id) => document.getElementById(id);
let api; // the document

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** Returns text as nodes, with code between backticks. */
const marked = (text) => text.split("`").map((part, i) =>
  (i % 2 ? element("code", { textContent: part }) : part));

const resolve = (schema) => schema?.$ref
  ? schema.$ref.slice(2).split("/").reduce((place, key) => place[key], api) : schema ?? {};

/** Describes a JSON schema in a few words; objects take several lines. */
function describe(given, indent = "") {
  const schema = resolve(given);
  if (schema.anyOf) return schema.anyOf.map((option) => describe(option, indent)).join(" | ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.format === "binary") return schema.minLength ? `${schema.minLength} bytes` : "bytes";
  if (schema.prefixItems) return `[${schema.prefixItems.map((item) => describe(item)).join(", ")}]`;
  if (schema.type === "array") {
    const count = schema.minItems !== undefined && schema.minItems === schema.maxItems;
    return `array${count ? ` of ${schema.minItems}` : ""}${schema.items ? `: ${describe(schema.items, indent)}` : ""}`;
  }
  if (schema.properties) {
    const lines = Object.entries(schema.properties).map(([name, property]) => {
      const optional = schema.required?.includes(name) ? "" : "?";
      const { description } = property;
      return `${indent}  ${name}${optional}: ${describe(property, `${indent}  `)}${description ? `  — ${description}` : ""}`;
    });
    return `{\n${lines.join("\n")}\n${indent}}`;
  }
  const kind = [schema.type ?? "anything"].flat().join(" | ");
  const bounded = schema.minimum !== undefined || schema.maximum !== undefined;
  return bounded ? `${kind} ${schema.minimum ?? ""}…${schema.maximum ?? ""}` : kind;
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Returns the curl command for an operation, with a body of this type if it takes one. */
function curl(method, path, operation, type) {
  const filled = path.replace(/{(\w+)}/g, (_, name) => {
    const { schema, example } = operation.parameters.find((parameter) => parameter.name === name);
    return encodeURIComponent(example ?? schema.examples?.[0] ?? name);
  });
  const lines = [`curl ${quoted(new URL(`.${filled}`, location.href).href)}`];
  const keyed = operation.security?.every((option) => Object.keys(option).length); // without a key otherwise
  if (keyed) lines.push('-H "Authorization: Bearer $BNLENET_API_KEY"');
  if (!type) {
    if (method === "post") lines.push("-X POST");
    return lines.join(" \\\n  ");
  }
  const { schema, example } = operation.requestBody.content[type];
  if (type === "multipart/form-data") {
    const [field] = Object.keys(resolve(schema).properties);
    return [...lines, `-F ${field}=@picture.png`].join(" \\\n  ");
  }
  lines.push(`-H ${quoted(`Content-Type: ${type}`)}`);
  if (type === "application/json") lines.push(`-d ${quoted(JSON.stringify(example ?? {}))}`);
  else if (type.startsWith("image/")) lines.push(`--data-binary @picture.${type.slice(6)}`);
  else {
    // With 0, the body is one image. Without the header field, JSON would have to come first.
    const header = "Inference-Header-Content-Length";
    if (operation.parameters?.some(({ name }) => name === header)) lines.push(`-H '${header}: 0'`);
    lines.push("--data-binary @pixels.bin");
  }
  return lines.join(" \\\n  ");
}

async function copy(code) {
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch { // browsers have a clipboard only at secure addresses
    getSelection().selectAllChildren(code);
    document.execCommand("copy");
  }
  $("copied").textContent = "Copied.";
}

function section(method, path, operation) {
  const code = element("code");
  const types = Object.keys(operation.requestBody?.content ?? {})
    .sort((a, b) => (b === "image/png") - (a === "image/png")); // the shortest command first
  const select = element("select", { ariaLabel: "Type of the body" }, ...types.map((type) => new Option(type)));
  const body = element("pre", { className: "schema", tabIndex: 0 });
  const choose = () => {
    code.textContent = curl(method, path, operation, select.value);
    body.textContent = select.value && describe(operation.requestBody.content[select.value].schema);
  };
  select.addEventListener("change", choose);
  choose();
  const button = element("button", { type: "button", className: "button small", textContent: "Copy" });
  button.addEventListener("click", async () => {
    await copy(code);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  const title = element("h3", {}, element("span", { className: "method", textContent: method.toUpperCase() }), ` ${path}`);
  const parts = [title, element("p", { className: "quiet" }, ...marked(operation.description ?? operation.summary))];
  if (types.length > 1) parts.push(select);
  parts.push(element("pre", { className: "curl", tabIndex: 0 }, code), button);
  const detail = (summary, ...content) =>
    parts.push(element("details", {}, element("summary", { textContent: summary }), ...content));
  if (operation.parameters?.length) {
    detail("Parameters", element("dl", {}, ...operation.parameters.map(({ name, in: place, schema, description }) =>
      element("div", {}, element("dt", { textContent: `${name} (${place})` }),
        element("dd", {}, ...marked(`${describe(schema)}. ${description ?? ""}`))))));
  }
  if (types.length) detail("Body", body);
  const { 200: good, ...others } = operation.responses;
  for (const [type, { schema, example }] of Object.entries(good?.content ?? {})) {
    if (type !== "application/json") continue;
    const shape = element("pre", { className: "schema", tabIndex: 0, textContent: describe(schema) });
    const sample = element("pre", { className: "schema", tabIndex: 0, textContent: JSON.stringify(example, null, 2) });
    detail("Answer", shape, ...(example ? [sample] : []));
  }
  const errors = Object.entries(others).map(([status, { description, content }]) => {
    const examples = Object.values(content?.["application/json"]?.examples ?? {});
    return element("div", {}, element("dt", { textContent: `${status} ${description}` }),
      ...examples.map(({ value }) => element("dd", {}, element("code", { textContent: value.code }), ` ${value.error}`)));
  });
  detail("Errors", element("dl", {}, ...errors),
    element("pre", { className: "schema", textContent: describe({ $ref: "#/components/schemas/Error" }) }));
  return element("section", { id: operation.operationId }, ...parts);
}

async function load() {
  $("retry").hidden = true;
  $("error").textContent = "";
  try {
    const response = await fetch("openapi.json");
    api = await response.json();
    const { info, paths } = api;
    $("about").textContent = `${info.description} Version ${info.version}. The file pixels.bin in the commands is one`
      + " image of 784 bytes, row by row; 0 is the background.";
    const groups = new Map();
    for (const [path, operations] of Object.entries(paths)) {
      for (const [method, operation] of Object.entries(operations)) {
        const [tag] = operation.tags ?? ["others"];
        groups.set(tag, [...groups.get(tag) ?? [], [method, path, operation]]);
      }
    }
    for (const [tag, routes] of groups) {
      const heading = `${tag[0].toUpperCase()}${tag.slice(1)}`;
      $("routes").append(element("h2", { textContent: heading }), ...routes.map((route) => section(...route)));
      $("list").append(element("p", { className: "name", textContent: heading }), element("ul", {},
        ...routes.map(([method, path, { operationId, summary }]) => element("li", {},
          element("a", {
            href: `#${operationId}`,
            textContent: path.includes("{model_version}") ? `${summary} (version)` : summary,
            title: `${method.toUpperCase()} ${path}`,
          })))));
    }
    $("list").open = matchMedia("(width >= 60rem)").matches;
    document.getElementById(location.hash.slice(1))?.scrollIntoView();
  } catch {
    $("error").textContent = "The service cannot be reached.";
    $("retry").hidden = false;
  }
}

$("retry").addEventListener("click", load);
load();
