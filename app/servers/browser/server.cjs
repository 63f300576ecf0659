// @playwright/mcp, driving a browser that this program starts: both inside, under one list of system calls.
//
//     node server.cjs <folder that has node_modules> <settings as JSON>
//
// settings: {executable, arguments, proxy, javascript, timeoutMs, tools}. Not its own command line: that opens a unix
// socket first, for others to join in, and no program of ours may make one.
'use strict'

const { existsSync, readFileSync, rmSync } = require('node:fs')
const { createRequire } = require('node:module')
const { createInterface } = require('node:readline')
const { setTimeout: pause } = require('node:timers/promises')

const [folder, text] = process.argv.slice(2)
const settings = JSON.parse(text)
const installed = createRequire(`${folder}/`)
const { createConnection } = installed('@playwright/mcp')
const { chromium } = installed('playwright')

const METHOD_NOT_FOUND = -32601
const MOST_PAGES = 10
const CLOSING_MS = 2000
const OUTPUT = '/tmp/output'
// Where a tool says that what the page looks like now is in a file, which nobody else can read.
const SNAPSHOT = /^- \[Snapshot\]\(output\/([\w-]+\.yml)\)$/m
let browser

async function newContext() {
  browser = await chromium.launch({
    executablePath: settings.executable,
    args: settings.arguments,
    headless: true,
    // Its own sandbox needs namespaces, which ours refuses. Ours is around it, and around this program as well.
    chromiumSandbox: false,
    // Loopback too, to which a browser would else go by itself: inside, nothing is there but the proxy.
    proxy: { server: settings.proxy, bypass: '<-loopback>' },
    ignoreDefaultArgs: ['--disable-popup-blocking'],
    timeout: settings.timeoutMs,
  })
  const context = await browser.newContext({
    acceptDownloads: false,
    javaScriptEnabled: settings.javascript,
    serviceWorkers: 'block',
  })
  context.on('page', page => context.pages().length > MOST_PAGES && page.close().catch(() => {}))
  return context
}


// Lines of JSON on the standard streams. Only the tools of the list are told of and called, and each call has an end.
class Desk {
  #listing = new Set()
  #calling = new Map()
  #late = new Set()

  async start() {
    createInterface({ input: process.stdin })
      .on('line', line => this.#take(JSON.parse(line)))
      .on('close', () => process.exit(0))
  }

  async close() {
    process.exit(0)
  }

  async send(message) {
    if (this.#late.delete(message.id)) return
    if (this.#listing.delete(message.id) && message.result) message.result.tools = offered(message.result.tools)
    if (this.#calling.has(message.id)) {
      clearTimeout(this.#calling.get(message.id))
      this.#calling.delete(message.id)
      message.result?.content?.forEach(show)
    }
    write(message)
  }

  #take(message) {
    const { id, method, params } = message
    if (method === 'tools/list') this.#listing.add(id)
    if (method === 'tools/call') {
      if (!settings.tools.includes(params?.name)) return this.send(refusal(id))
      this.#calling.set(id, setTimeout(() => this.#giveUp(id), settings.timeoutMs))
    }
    this.onmessage(message)
  }

  // A page may keep its process busy for ever. The next call has a new browser, as the first one had.
  async #giveUp(id) {
    this.#calling.delete(id)
    this.#late.add(id)
    await Promise.race([browser?.close(), pause(CLOSING_MS)]).catch(() => {})
    const content = [{ type: 'text', text: `not done within ${settings.timeoutMs / 1000} s; the browser begins anew` }]
    write({ jsonrpc: '2.0', id, result: { content, isError: true } })
  }
}

function write(message) {
  process.stdout.write(`${JSON.stringify(message)}\n`)
}

function refusal(id) {
  return { jsonrpc: '2.0', id, error: { code: METHOD_NOT_FOUND, message: 'there is no such tool' } }
}

function offered(tools) {
  const those = tools.filter(tool => settings.tools.includes(tool.name))
  for (const tool of those) {
    delete tool.inputSchema.properties.filename
    delete tool.inputSchema.properties.paths
  }
  return those
}

function show(block) {
  const file = SNAPSHOT.exec(block.text ?? '')
  const path = file && `${OUTPUT}/${file[1]}`
  if (!file || !existsSync(path)) return // a page may write such a line, too
  block.text = block.text.replace(file[0], () => `\`\`\`yaml\n${readFileSync(path, 'utf8')}\n\`\`\``)
  rmSync(path)
}

async function main() {
  const server = await createConnection({
    browser: { browserName: 'chromium', isolated: false },
    timeouts: { navigation: settings.timeoutMs, action: Math.min(settings.timeoutMs, 5000) },
    outputDir: OUTPUT,
    outputMaxSize: 16 << 20,
    imageResponses: 'omit',
    codegen: 'none',
    // A page could else register tools of its own, which no policy knows.
    webmcp: false,
  }, newContext)
  await server.connect(new Desk())
}

main()
