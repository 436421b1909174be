// What the page asks of the server.

/** How an answer is drawn. A seed is always named, so that the request can be repeated. */
export function samplingOf({ greedy, temperature, topP, seed, maxTokens }) {
  return {
    max_tokens: maxTokens,
    ...(greedy ? { temperature: 0 } : { temperature, top_p: topP, seed }),
    stream: true,
    stream_options: { include_usage: true },
  };
}

function systemMessages(text) {
  const content = text.toWellFormed();
  return content.trim() ? [{ role: "system", content }] : [];
}

/** Of /v1/chat/completions. `past` are earlier turns: {prompt, response, attributes}; undefined where a model has none. */
export function chatBody(model, system, past, prompt, attributes, sampled) {
  const told = past.flatMap(({ prompt, response, attributes }) => [
    { role: "user", content: prompt.toWellFormed() },
    { role: "assistant", content: response, ...(attributes && { attributes }) },
  ]);
  return {
    model,
    messages: [...systemMessages(system), ...told, { role: "user", content: prompt.toWellFormed() }],
    ...(attributes && { attributes }),
    ...sampled,
  };
}

/** Of /v1/completions. */
export function completionBody(model, text, sampled) {
  return { model, prompt: text.toWellFormed(), ...sampled };
}

/** Of /v1/annotate: one response to one question. */
export function annotateBody(system, question, response) {
  const messages = [
    ...systemMessages(system),
    { role: "user", content: question.toWellFormed() },
    { role: "assistant", content: response.toWellFormed() },
  ];
  return { conversations: [{ messages }], soft: true };
}
