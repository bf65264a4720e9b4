// What sdk.py is, for OpenAI's library for Node: node sdk.js URL
const {OpenAI, toFile} = require("openai");
const [url] = process.argv.slice(2), results = {};
const messages = [{role: "user", content: "Hello"}];
const defaultHeaders = {  // Roo Code's
  "HTTP-Referer": "https://github.com/RooVetGit/Roo-Cline", "X-Title": "Roo Code",
  "User-Agent": "RooCode/3.36.0",
};
const client = new OpenAI({baseURL: `${url}/v1`, apiKey: "secret", defaultHeaders});
const ask = (model, wish, {key = "secret", retries = 2}) =>
  client.withOptions({apiKey: key, maxRetries: retries})
    .chat.completions.create({model, messages, ...wish});
const joined = (calls) =>
  (calls ?? []).map(({function: f}) => (f.name ?? "") + (f.arguments ?? "")).join("");
const calls = {
  lists: async () => (await client.models.list()).data.map((each) => each.id).sort(),
  finds: async (model) => (await client.models.retrieve(model)).id,
  async whole(...asked) {
    const {choices: [{message, finish_reason}], usage} = await ask(...asked);
    const text = message.content || joined(message.tool_calls);
    return [text, finish_reason, usage.completion_tokens];
  },
  async flow(model, wish, options) {
    let text = "", used, end;
    wish = {...wish, stream: true, stream_options: {include_usage: true}};
    for await (const {choices, usage} of await ask(model, wish, options)) {
      used = usage ?? used;
      for (const {delta, finish_reason} of choices) {
        text += delta.content || joined(delta.tool_calls);
        end = finish_reason ?? end;
      }
    }
    return [text, end, used?.completion_tokens];
  },
  embeds: async (model, input) =>
    (await client.embeddings.create({model, input})).data
      .map(({embedding}) => [embedding.length, embedding[0]]),
  async uploads(model, size) {
    const file = await toFile(Buffer.alloc(size), "a.wav");
    return (await client.audio.transcriptions.create({model, file})).text;
  },
};
(async () => {
  const cases = Object.entries(JSON.parse(require("fs").readFileSync(0)));
  for (const [name, [call, ...asked]] of cases) {
    if (!(call in calls)) continue;
    const failed = (error) => [error.constructor.name, error.status ?? null];
    const answer = Promise.resolve().then(() => calls[call](...asked));
    results[name] = await answer.catch(failed);
  }
  console.log(JSON.stringify(results));
})();
