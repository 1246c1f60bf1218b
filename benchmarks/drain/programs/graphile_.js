// graphile-worker at its best settings: a local queue, completions in batches. It deletes jobs and keeps no record.
const { run, runMigrations, makeWorkerUtils, Logger } = require("graphile-worker");
const { createInterface } = require("node:readline");

const [action, url, what] = process.argv.slice(2);
const logger = new Logger(() => () => {});
const say = (line) => process.stdout.write(`${line}\n`);

async function fill(number) {
  await runMigrations({ connectionString: url, logger });
  const utils = await makeWorkerUtils({ connectionString: url, logger });
  // In parts: within one transaction each call would walk past the row of the task that all calls before it have rewritten.
  for (let left = number; left > 0; left -= 500)
    await utils.withPgClient((client) =>
      client.query("select graphile_worker.add_job('noop', '{}'::json) from generate_series(1, $1::int)", [Math.min(left, 500)]));
  await utils.release();
}

async function drain(single) {
  const settings = single
    ? { concurrentJobs: 1 }
    : { concurrentJobs: 24, completeJobBatchDelay: 0, failJobBatchDelay: 0, localQueue: { size: 500 } };
  say("ready");
  await new Promise((go) => createInterface({ input: process.stdin }).once("line", go));
  const runner = await run({
    taskList: { noop: () => {} },
    logger,
    noHandleSignals: true,
    preset: { worker: { connectionString: url, pollInterval: 100, maxPoolSize: 10, ...settings } },
  });
  const utils = await makeWorkerUtils({ connectionString: url, logger });
  for (;;) {
    const { rows } = await utils.withPgClient((client) =>
      client.query("select exists (select 1 from graphile_worker._private_jobs) as left"));
    if (!rows[0].left) break;
    await new Promise((wait) => setTimeout(wait, 20));
  }
  say("done");
  await utils.release();
  await runner.stop();
  process.exit(0);
}

(action === "fill" ? fill(Number(what)).then(() => process.exit(0)) : drain(what === "single"));
