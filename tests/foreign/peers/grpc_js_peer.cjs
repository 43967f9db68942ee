// @grpc/grpc-js as a client: prints what it was told as JSON. Arguments: ADDRESS, then folders of .proto files.
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const health = require("grpc-health-check");

const [address, ...includeDirs] = process.argv.slice(2);
const options = { longs: Number, enums: String, oneofs: true, includeDirs };
const load = (file) => grpc.loadPackageDefinition(loader.loadSync(file, options));
const { RewardService } = load("rlaif/reward/v1/reward.proto").rlaif.reward.v1;
const { Health } = load(health.protoPath).grpc.health.v1;

const plain = grpc.credentials.createInsecure();
const client = new RewardService(address, plain);
const request = (...responses) => ({
  items: responses.map((content, id) => ({
    id,
    conversation: { messages: [{ role: "user", content: "q" }, { role: "assistant", content }] },
  })),
});

const scores = () =>
  new Promise((done, fail) =>
    client.Score(request("a", "bb"), (err, answer) =>
      err ? fail(err) : done(answer.outcomes.map((o) => o.score.raw))));

const refusal = () =>
  new Promise((done) =>
    client.Score({}, (err) =>
      done([grpc.status[err.code], err.metadata.get("grpc-status-details-bin").length === 1])));

const stream = () =>
  new Promise((done, fail) => {
    const call = client.ScoreStream();
    const found = {};
    call.on("data", (a) => (found[a.requestId] = a.response.outcomes[0].score.raw));
    call.on("error", fail);
    call.on("end", () => done(found));
    for (let i = 1; i <= 5; i++) call.write({ requestId: i, request: request("x".repeat(i)) });
    call.end();
  });

const watched = () =>
  new Promise((done, fail) => {
    const call = new Health(address, plain).Watch({ service: "rlaif.reward.v1.RewardService" });
    call.on("error", fail);
    call.on("data", (answer) => {
      call.removeAllListeners("error");
      call.on("error", () => {}); // our own cancellation
      call.cancel();
      done(answer.status);
    });
  });

(async () => {
  const found = { scores: await scores(), refusal: await refusal(), stream: await stream(), health: await watched() };
  console.log(JSON.stringify(found));
  process.exit(0);
})().catch((err) => {
  console.error(err);
  process.exit(1);
});
