// The same for Node.js, in the one thing that differs: by which way it goes out.
import { createInterface } from 'node:readline'

const tool = { name: 'act', inputSchema: { type: 'object' } }
const info = { name: 'probe', version: '1' }

async function answer(method, params) {
  if (method === 'initialize')
    return { protocolVersion: params.protocolVersion, capabilities: { tools: {} }, serverInfo: info }
  if (method === 'tools/list') return { tools: [tool] }
  if (method !== 'tools/call') return undefined
  const text = await fetch(params.arguments.words[1]).then(page => page.text(), error => `${error} ${error.cause}`)
  return { content: [{ type: 'text', text }] }
}

for await (const line of createInterface({ input: process.stdin })) {
  const { id, method, params } = JSON.parse(line)
  const result = await answer(method, params)
  if (result) console.log(JSON.stringify({ jsonrpc: '2.0', id, result }))
}
