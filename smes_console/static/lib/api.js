// Requests to the console's own server. What is not GET carries the token.

export class ApiError extends Error {
  constructor(status, detail) {
    super(detail);
    this.name = "ApiError";
    this.status = status; // 0: no answer
  }
}

const KEY = "smes-token";
// A console that hangs, or a connection that died while a phone slept, gives no answer and no error for minutes.
const LONGEST_MS = 10_000;

// The token of the address (#token=…), kept for this tab.
export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

async function ask(path, options) {
  let response, text;
  try {
    response = await fetch(path, options);
    text = await response.text();
  } catch {
    throw new ApiError(0, "the console gave no answer; does `smes console` still run?");
  }
  let body = null;
  try {
    body = text ? JSON.parse(text) : null;
  } catch {
    const said = response.ok ? "the answer is no JSON" : `status ${response.status}; the console's log says why`;
    throw new ApiError(response.status, `${path}: ${said}`);
  }
  if (!response.ok) throw new ApiError(response.status, detailOf(body) ?? `${path}: status ${response.status}`);
  return body;
}

function detailOf(body) {
  const detail = body?.detail;
  if (Array.isArray(detail)) return detail.map((each) => `${(each.loc ?? []).join(".")}: ${each.msg}`).join("; ");
  return typeof detail === "string" ? detail : null;
}

// `askForToken(why)` resolves to a token that a person typed, or to null.
export function createApi(askForToken) {
  let declined = false; // then reading does not ask again: it would do so every second
  const headers = () => (token.get() ? { authorization: `Bearer ${token.get()}` } : {});

  async function withToken(send, reads) {
    let why = "This needs a token: the part after #token= of the address that `smes console` printed.";
    for (;;) {
      try {
        return await send();
      } catch (error) {
        if (!(error instanceof ApiError) || error.status !== 401) throw error;
        if (reads && declined) throw new ApiError(401, `${error.message}; the key t asks for it`);
        if (token.get()) why = "That token is not, or no longer, accepted.";
        const typed = await askForToken(why);
        declined = !typed;
        if (!typed) throw error;
        token.set(typed);
      }
    }
  }

  return {
    // From now on this token is shown.
    use(given) {
      token.set(given);
      declined = false;
    },
    // The JSON at a path. Throws ApiError.
    get: (path) =>
      withToken(() => ask(path, { headers: headers(), signal: AbortSignal.timeout(LONGEST_MS) }), true),
    // Sends JSON, with the token; asks the person for one where there is none, or a wrong one. Throws ApiError.
    post: (path, body = {}) =>
      withToken(
        () =>
          ask(path, {
            method: "POST",
            headers: { "content-type": "application/json", ...headers() },
            body: JSON.stringify(body),
          }),
        false,
      ),
  };
}
